"""Answers through the whole server are those of `lowtide generate`, whatever client asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import small
from serving import POSITIONS, Running, Starting, write_adapter

from lowtide.data.tokenizer import Tokenizer


def client(server: Running, token: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=token, max_retries=0)


def generated(model: Path, prompt: str, *more: object) -> dict[str, Any]:
    done = small.run("generate", "--model", model, "--prompt", prompt, "--json", *more)
    assert done.code == 0, done.err
    return done.document


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("tuned", [False, True])
def test_chats_are_what_generate_says(
    tuned: bool, model: Path, adapter: Path, start: Starting
) -> None:
    chat = client(start({"tuned": adapter})).chat.completions
    name, flags = ("tuned", ["--adapter-path", adapter]) if tuned else ("tiny", [])
    expected = generated(model, "The", "--max-tokens", 40, *flags)
    asked: dict[str, Any] = {
        "model": name, "messages": user("The"), "max_tokens": 40, "temperature": 0,
    }  # fmt: skip
    whole = chat.create(**asked)
    assert whole.choices[0].message.content == expected["text"]
    assert whole.choices[0].message.role == "assistant"
    pieces = list(chat.create(stream=True, stream_options={"include_usage": True}, **asked))
    assert "".join(p.choices[0].delta.content or "" for p in pieces[:-1]) == expected["text"]
    assert len(pieces) > 20  # it does come in pieces
    assert [p.choices[0].finish_reason for p in pieces[:-1] if p.choices[0].finish_reason] == [
        "length" if expected["n_tokens"] == 40 else "stop"
    ]
    rendered = Tokenizer.load(model).render_chat(user("The"), True)
    n_prompt = len(Tokenizer.load(model).encode(rendered, add_special_tokens=False))
    assert whole.usage is not None
    assert pieces[-1].usage == whole.usage
    assert not pieces[-1].choices
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (
        n_prompt, expected["n_tokens"],
    )  # fmt: skip
    assert whole.usage.total_tokens == n_prompt + expected["n_tokens"]
    assert (whole.model, pieces[0].model) == (name, name)


def test_base_and_adapter_differ(model: Path, adapter: Path, start: Starting) -> None:
    server = start({"tuned": adapter})
    texts = {server.chat(model=name, max_tokens=30).body for name in ("base", "tuned")}
    contents = [json.loads(t)["choices"][0]["message"]["content"] for t in texts]
    assert contents[0] != contents[1]


def test_completions_are_what_generate_says_without_a_template(
    model: Path, server: Running
) -> None:
    expected = generated(model, "The number 7", "--max-tokens", 30, "--chat-template", "none")
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 30, "temperature": 0}
    completions = client(server).completions
    ids = Tokenizer.load(model).encode_document("The number 7")[0]
    for prompt in ("The number 7", ["The number 7"], ids, [ids]):
        whole = completions.create(prompt=prompt, **asked)
        assert whole.choices[0].text == expected["text"]
    pieces = completions.create(prompt="The number 7", stream=True, **asked)
    assert "".join(piece.choices[0].text for piece in pieces) == expected["text"]
    empty = completions.create(prompt="", **asked)
    assert empty.choices[0].text == generated(model, "", "--max-tokens", 30)["text"]


def test_a_conversation_that_goes_on_is_read_on_and_answered_as_if_read_anew(
    model: Path, adapter: Path, start: Starting
) -> None:
    """What the caches keep between requests changes no answer."""
    server, fresh = start({"tuned": adapter}), []
    turns = user("one")
    for number in range(4):
        for name in ("base", "tuned"):
            asked = {"model": name, "messages": turns, "temperature": 0, "max_tokens": 12}
            told = server.ask("POST", "/v1/chat/completions", asked).document
            alone = start({"tuned": adapter}).ask("POST", "/v1/chat/completions", asked).document
            assert told["choices"] == alone["choices"]
            assert told["usage"] == alone["usage"]
            fresh.append(told["choices"][0]["message"]["content"])
        turns = [*turns, {"role": "assistant", "content": fresh[-1]}, *user(f"and {number}")]


def test_the_seed_decides_and_without_one_answers_vary(server: Running) -> None:
    def text(**more: Any) -> str:
        told = server.chat(**{"temperature": 1.5, "max_tokens": 20, **more}).document
        return str(told["choices"][0]["message"]["content"])

    assert text(seed=5) == text(seed=5)
    assert text(seed=5) != text(seed=6)
    assert text() != text()
    assert text(seed=5, top_p=0) == text(seed=6, top_p=1e-9) == text(seed=7, temperature=0.0)


def test_a_stop_text_ends_the_answer_and_is_not_in_it(model: Path, server: Running) -> None:
    whole = generated(model, "The", "--max-tokens", 40)["text"]
    stop = whole[10:12]
    expected = whole[: whole.index(stop)]
    for given in (stop, ["never there", stop]):
        told = server.chat(max_tokens=40, stop=given).document["choices"][0]
        assert told["message"]["content"] == expected
        assert told["finish_reason"] == "stop"
    streamed = client(server).chat.completions.create(
        model="tiny", messages=user("The"), max_tokens=40, temperature=0, stop=stop, stream=True
    )
    assert "".join(p.choices[0].delta.content or "" for p in streamed) == expected


def test_both_names_of_the_length_and_the_default(server: Running) -> None:
    def count(**more: Any) -> int:
        return int(server.chat(**more).document["usage"]["completion_tokens"])

    assert count(max_tokens=5) == 5
    assert count(max_tokens=None, max_completion_tokens=6) == 6
    assert count(max_tokens=7, max_completion_tokens=7) == 7
    assert count(max_tokens=None) == 64


def test_an_answer_ends_where_the_context_does(server: Running) -> None:
    told = server.ask(
        "POST", "/v1/completions",
        {"model": "base", "prompt": "x" * (POSITIONS - 10), "max_tokens": 10_000, "temperature": 0},
    ).document  # fmt: skip
    # One more than there are positions left: the last token needs none.
    assert told["usage"]["completion_tokens"] == 11
    assert told["choices"][0]["finish_reason"] == "length"
    refused = server.ask(
        "POST", "/v1/completions", {"model": "base", "prompt": "x" * (POSITIONS + 1)}
    )
    assert refused.status == 400
    assert refused.document["error"]["code"] == "context_length_exceeded"
    assert "the prompt has 2,049 tokens" in refused.message
    assert "may have 2,048" in refused.message


def test_models_are_listed(adapter: Path, start: Starting) -> None:
    server = start({"tuned": adapter, "other": adapter})
    listed = client(server).models.list().data
    assert [one.id for one in listed] == ["tiny", "tuned", "other"]
    assert client(server).models.retrieve("tuned").id == "tuned"
    assert server.ask("GET", "/v1/models/tuned").document["parent"] == "tiny"
    assert server.ask("GET", "/v1/models/base").document["id"] == "tiny"
    assert server.ask("GET", "/health").document == {"status": "ok"}


def test_the_clients_exceptions_are_the_right_ones(server: Running) -> None:
    chat = client(server).chat.completions
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'; there are: tiny"):
        chat.create(model="gpt", messages=user("x"))
    with pytest.raises(openai.BadRequestError, match="n = 3 is not supported") as told:
        chat.create(model="tiny", messages=user("x"), n=3)
    assert told.value.param == "n"


def test_without_a_chat_template_completions_still_answer(start: Starting) -> None:
    server = start(template="none")
    refused = server.chat()
    assert refused.status == 400
    assert "has no chat template" in refused.message
    assert "--chat-template FILE" in refused.message
    assert "/v1/completions" in refused.message
    told = server.ask("POST", "/v1/completions", {"model": "base", "prompt": "x", "max_tokens": 3})
    assert told.document["usage"]["completion_tokens"] == 3


def test_an_adapter_is_read_again_when_it_changes(
    model: Path, adapter: Path, tmp_path: Path, start: Starting
) -> None:
    server = start({"tuned": adapter})

    def told() -> tuple[str, str]:
        document = server.chat(model="tuned", max_tokens=30).document
        return document["choices"][0]["message"]["content"], document["system_fingerprint"]

    def expected() -> str:
        flags = ("--max-tokens", 30, "--adapter-path", adapter)
        return str(generated(model, "The", *flags)["text"])

    before = told()
    assert before[0] == expected()
    write_adapter(model, adapter, 3)
    after = told()
    assert after[0] == expected() != before[0]
    assert after[1] != before[1]
    # A run that is removed, or half written, leaves what was served before.
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert told() == after
    assert told() == after
    weights.unlink()
    assert told() == after
    write_adapter(model, adapter, 1)
    assert told() == before
    assert sum("stays as it was" in line for line in server.said) == 2  # once for each reason
    assert sum("was read again" in line for line in server.said) == 2


def test_adapters_are_loaded_and_unloaded_at_run_time(
    model: Path, adapter: Path, tmp_path: Path, start: Starting
) -> None:
    server = start(root=adapter.parent)
    load = {"lora_name": "mine", "lora_path": "tuned"}
    assert server.ask("POST", "/v1/load_lora_adapter", load).status == 200
    text = server.chat(model="mine", max_tokens=30).document["choices"][0]["message"]["content"]
    flags = ("--max-tokens", 30, "--adapter-path", adapter)
    assert text == generated(model, "The", *flags)["text"]
    again = server.ask("POST", "/v1/load_lora_adapter", load)
    assert (again.status, "the name 'mine' is taken" in again.message) == (400, True)
    assert server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": "mine"}).status == 200
    assert server.chat(model="mine").status == 404
    assert server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": "mine"}).status == 404
    assert server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": "tiny"}).status == 400


@pytest.mark.parametrize("path", ["..", "../tuned", "/etc", ".", "", "a\0b", "link"])
def test_no_adapter_from_elsewhere(
    path: str, adapter: Path, tmp_path: Path, start: Starting
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(adapter)
    asked = {"lora_name": "mine", "lora_path": path}
    told = start(root=root).ask("POST", "/v1/load_lora_adapter", asked)
    assert told.status == (400 if path == "" else 403)
    assert "lora_path" in told.message
    refused = start().ask("POST", "/v1/load_lora_adapter", asked | {"lora_path": "tuned"})
    assert (refused.status, "--adapter-root" in refused.message) == (403, True)
