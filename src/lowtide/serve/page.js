"use strict";
// Text from models and servers goes to the page as textContent only, never as markup.
const $ = (id) => document.getElementById(id);
const SAVED = ["system", "temperature", "top_p", "max_tokens", "seed"];
const sides = [
  { select: $("left"), history: [] },
  { select: $("right"), history: [] },
];
let running = null;

function headers() {
  const token = $("token").value.trim();
  const all = { "Content-Type": "application/json" };
  if (token) all.Authorization = `Bearer ${token}`;
  return all;
}

async function faultOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function listModels() {
  let message = "the server cannot be reached";
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (response.ok) {
      const names = (await response.json()).data.map((model) => model.id);
      fill($("left"), names, names[0]);
      fill($("right"), ["", ...names], names[1] ?? "");
      showHint();
      return;
    }
    message = await faultOf(response);
    if (response.status === 401) {
      $("settings").open = true;
      $("token").focus();
    }
  } catch {
    // told below
  }
  $("empty").textContent = message;
}

function fill(select, names, chosen) {
  const before = select.value;
  select.replaceChildren(...names.map((name) => new Option(name || "none", name)));
  select.value = names.includes(before) && before ? before : chosen;
}

function showHint() {
  $("empty").textContent = $("right").value
    ? "Ask something. Both models answer, one after the other."
    : "Ask something.";
}

function settings() {
  const asked = {};
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if ($(name).value !== "") asked[name] = Number($(name).value);
  }
  return asked;
}

function element(parent, kind, name, text) {
  const one = document.createElement(kind);
  one.className = name;
  one.textContent = text;
  parent.append(one);
  return one;
}

function atEnd() {
  return window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 60;
}

function scrollDown(was) {
  if (was) window.scrollTo(0, document.documentElement.scrollHeight);
}

function card(parent, name) {
  const box = element(parent, "section", "answer", "");
  element(box, "h2", "", name);
  return { box, body: element(box, "div", "body", ""), foot: element(box, "div", "foot", "waiting") };
}

function request(side, text) {
  const common = { model: side.select.value, stream: true, ...settings() };
  common.stream_options = { include_usage: true };
  if ($("plain").checked) return ["/v1/completions", { ...common, prompt: text }];
  const system = $("system").value.trim();
  const first = system ? [{ role: "system", content: system }] : [];
  const messages = [...first, ...side.history, { role: "user", content: text }];
  return ["/v1/chat/completions", { ...common, messages }];
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function answer(side, text, shown, signal) {
  const [path, body] = request(side, text);
  const { history } = side; // a new chat begins another one
  const started = performance.now();
  let content = "";
  let usage = null;
  let finish = null;
  shown.box.classList.add("going");
  try {
    const sent = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
    const response = await fetch(path, sent);
    if (!response.ok) throw new Error(await faultOf(response));
    for await (const event of events(response)) {
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      if (!choice) continue;
      finish = choice.finish_reason ?? finish;
      const piece = choice.delta ? choice.delta.content : choice.text;
      if (!piece) continue;
      const was = atEnd();
      content += piece;
      shown.body.append(piece); // a text node
      scrollDown(was);
    }
    shown.foot.textContent = told(usage, finish, performance.now() - started);
  } catch (error) {
    const stopped = error.name === "AbortError";
    shown.foot.textContent = stopped ? "stopped" : error.message;
    if (!stopped) shown.box.classList.add("failed");
  } finally {
    shown.box.classList.remove("going");
  }
  if (content && !$("plain").checked) {
    history.push({ role: "user", content: text }, { role: "assistant", content });
  }
}

function told(usage, finish, milliseconds) {
  const seconds = milliseconds / 1000;
  const parts = [];
  if (usage) {
    parts.push(`${usage.completion_tokens} tokens`, `prompt ${usage.prompt_tokens}`);
    if (seconds > 0) parts.push(`${(usage.completion_tokens / seconds).toFixed(1)} tokens/s`);
  }
  parts.push(`${seconds.toFixed(1)} s`);
  if (finish === "length") parts.push("cut at the most tokens");
  return parts.join(" · ");
}

async function ask(text) {
  running = new AbortController();
  const { signal } = running;
  $("send").hidden = true;
  $("stop").hidden = false;
  $("empty").hidden = true;
  element($("turns"), "div", "asked", text);
  const row = element($("turns"), "div", "answers", "");
  const asked = sides.filter((side) => side.select.value);
  const shown = asked.map((side) => card(row, side.select.value));
  scrollDown(true);
  for (const [place, side] of asked.entries()) {
    if (signal.aborted) shown[place].foot.textContent = "stopped";
    else await answer(side, text, shown[place], signal);
  }
  running = null;
  $("send").hidden = false;
  $("stop").hidden = true;
  $("text").focus();
}

function grow() {
  const box = $("text");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value;
  if (running || (!text.trim() && !$("plain").checked)) return;
  $("text").value = "";
  grow();
  ask(text);
});
$("text").addEventListener("input", grow);
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => {
  running?.abort();
  for (const side of sides) side.history = [];
  $("turns").replaceChildren();
  $("empty").hidden = false;
  $("text").focus();
});
$("right").addEventListener("change", showHint);
$("token").addEventListener("change", () => {
  sessionStorage.setItem("lowtide.token", $("token").value);
  listModels();
});
$("token").value = sessionStorage.getItem("lowtide.token") ?? "";
for (const name of SAVED) {
  $(name).value = localStorage.getItem(`lowtide.${name}`) ?? "";
  $(name).addEventListener("change", () => localStorage.setItem(`lowtide.${name}`, $(name).value));
}
listModels();
