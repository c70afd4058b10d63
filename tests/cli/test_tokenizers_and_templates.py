"""What commands say about tokenizers and chat templates, theirs and the user's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import small

QUESTION = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yo"}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = {"messages": [QUESTION, ANSWER]}
STRICT = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}<|im_start|>{{ m.role }} "
    "{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def with_template(model: Path, out: Path, template: str | None) -> Path:
    shutil.copytree(model, out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = template
    path.write_text(json.dumps(config))
    return out


def test_info_says_what_the_template_does(model: Path, tmp_path: Path) -> None:
    own = small.run("info", model)
    assert "chat         the directory's own template: writes no BOS, takes a system" in own.out
    assert "takes roles in any order, ends a turn with <|im_end|>" in own.out
    strict = with_template(model, tmp_path / "strict", STRICT)
    said = small.run("info", strict).out
    assert "writes BOS, refuses a system message, insists that user and assistant take" in said
    document = small.run("info", strict, "--json").document["chat_template"]
    assert document == {
        "refuses": None,
        "writes_bos": True,
        "system": "refuses",
        "alternates": True,
        "end_of_turn": "<|im_end|>",
        "dated": False,
    }


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "chat         no template; chats need --chat-template FILE, or --tokenizer DIR"),
        ("{% if %}", "chat         unknown: the chat template of "),
        ("{{ raise_exception('no') }}", "refuses a plain question and answer: no"),
        ("{{ strftime_now('%d') }}{{ messages[-1].content }}", "writes today's date"),
    ],
)
def test_info_on_other_templates(
    model: Path, tmp_path: Path, template: str | None, said: str
) -> None:
    outcome = small.run("info", with_template(model, tmp_path / "m", template))
    assert outcome.code == 0
    assert said in outcome.out


def test_info_without_a_tokenizer(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "m"
    shutil.copytree(model, copy)
    (copy / "tokenizer.json").rename(copy / "tokenizer.model")
    outcome = small.run("info", copy)
    assert outcome.code == 0
    assert "holds tokenizer.model" in outcome.out
    assert "save_pretrained" in outcome.out


@pytest.mark.parametrize(
    ("template", "record", "parts"),
    [
        (
            STRICT,
            {"messages": [SYSTEM, QUESTION, ANSWER]},
            ["System role not supported", "at the start of the first user message"],
        ),
        (
            STRICT,
            {"messages": [QUESTION, {**ANSWER, "tool_calls": [{}]}, {**QUESTION, "role": "tool"}]},
            ["Roles must alternate", "may not be made for tools", "leave such records out"],
        ),
        ("{{ messages[7].content.x }}", GOOD, ["refuses even a plain question and answer"]),
        ("{% for %}", GOOD, ["is not a valid Jinja template: line 1", "--chat-template FILE"]),
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
            GOOD,
            ["it does not come to an end: more than 200,000 turns of its loops"],
        ),
        (None, GOOD, ["--chat-template FILE", "--tokenizer DIR", "--chat-template none"]),
        (
            STRICT,
            {**GOOD, "chat_template_kwargs": [1]},
            ["'chat_template_kwargs' is a list; expected an object"],
        ),
    ],
)
def test_a_record_that_the_template_refuses(
    model: Path, tmp_path: Path, template: str | None, record: Any, parts: list[str]
) -> None:
    copy = with_template(model, tmp_path / "m", template)
    rows = [{"messages": [QUESTION, ANSWER]}, record]
    data = small.write_jsonl(tmp_path / "d.jsonl", rows if template == STRICT else rows[::-1])
    outcome = small.run("eval", "--model", copy, "--data", data, "--max-seq-length", 32)
    assert outcome.code == 2, outcome
    line = 2 if template == STRICT else 1
    for part in [f"line {line}", *parts]:
        assert part in outcome.err, f"{part!r} is not in:\n{outcome.err}"


def test_what_else_a_template_reads(model: Path, tmp_path: Path) -> None:
    source = "{% if not enable_thinking %}{{ raise_exception('think!') }}{% endif %}" + small.CHATML
    template = tmp_path / "t.jinja"
    template.write_text(source)
    for thinking in (True, False):
        row = {**GOOD, "chat_template_kwargs": {"enable_thinking": thinking}}
        data = small.write_jsonl(tmp_path / "d.jsonl", [row])
        outcome = small.run("eval", "--model", model, "--data", data, "--mask-prompt",
                            "--max-seq-length", 64, "--chat-template", template)  # fmt: skip
        assert outcome.code == (0 if thinking else 2), outcome


def test_a_vocabulary_that_does_not_match(model: Path, data: Path, tmp_path: Path) -> None:
    """Both sizes are named; a run goes on as long as no id is out of range."""
    larger = small.write_small_model(tmp_path / "larger", vocab_size=2000)
    smaller = small.write_small_model(tmp_path / "smaller", vocab_size=258)
    given = ("--data", data, "--max-seq-length", 32)
    for directory, size in ((larger, "2,000"), (smaller, "258")):
        for command in (["info", directory], ["eval", "--model", directory, *given],
                        ["train", "--model", directory, *given, "--iters", 1,
                         "--adapter-path", tmp_path / f"a{size}"]):  # fmt: skip
            outcome = small.run(*command)
            assert outcome.code == 0, outcome
            lines = [line for line in outcome.err.splitlines() if line.startswith("lowtide: the t")]
            assert len(lines) == 1, outcome.err
            assert "260 tokens" in lines[0]
            assert f"the model {size}" in lines[0]
            assert "--tokenizer" in lines[0]
    assert "the tokenizer has" not in small.run("info", model).err

    chats = small.write_jsonl(tmp_path / "chats.jsonl", [GOOD])
    outcome = small.run("eval", "--model", smaller, "--data", chats, "--max-seq-length", 32)
    assert outcome.code == 2
    assert "line 1: tokenizer and model do not match: token '<|im_end|>' has id 259" in outcome.err


def test_generate_warns_of_it_too(tmp_path: Path) -> None:
    larger = small.write_small_model(tmp_path / "larger", vocab_size=2000)
    outcome = small.run("generate", "--model", larger, "--prompt", "Hi", "--max-tokens", 1)
    assert outcome.code == 0
    assert "only 260 tokens and the model 2,000" in outcome.err
