"""Data that cannot be learnt from, as `train` and `eval` report it; `tests/data` has the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import small

GOOD = {"prompt": "What comes after one?", "completion": "Two."}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def roles(*names: str) -> dict[str, object]:
    return {"messages": [{"role": name, "content": "words"} for name in names]}


@pytest.mark.parametrize(
    ("rows", "flags", "parts"),
    [
        ([GOOD, '{"prompt": "a",'], [], ["line 2: not valid JSON", "Mend or remove"]),
        ([GOOD, {"text": "x"}], [], ["line 2: found the keys 'text'", "prompt and completion"]),
        ([GOOD, {}], [], ["line 2: the record is empty"]),
        ([GOOD, [1]], [], ["line 2: found a list; expected an object"]),
        ([{**GOOD, "completion": " "}], [], ["line 1: 'completion' is empty"]),
        ([{**GOOD, "prompt": 3}], [], ["line 1: 'prompt' is a number; expected a string"]),
        ([{"question": "x"}], [], ["no known format has the keys 'question'", "--prompt-feature"]),
        ([], [], ["holds no records"]),
        ([roles("assistant", "user")], [], ["line 1: message 1 is from assistant; expected user"]),
        ([roles("user", "user")], [], ["line 1: message 2 is a second user message"]),
        ([roles("user", "system")], [], ["system, which may only come first"]),
        ([roles("user")], [], ["no message is from assistant"]),
        ([roles("user", "robot")], [], ["role 'robot'; expected system, user, assistant"]),
        ([{"messages": []}], [], ["'messages' is empty"]),
        (
            [{**GOOD, "prompt": "long " * 20}],
            ["--mask-prompt"],
            ["leaves nothing to train on", "--max-seq-length", "--mask-prompt"],
        ),
        ([{"text": "plain"}], ["--mask-prompt"], ["--mask-prompt needs prompts to mask"]),
        (
            [{"messages": CHAT}],
            ["--chat-template", "none"],
            ["line 1: a conversation needs a chat template", "--chat-template FILE"],
        ),
        ([{"a": "b"}], ["--text-feature", "c"], ["no known format has the keys 'a'", "text: 'c'"]),
    ],
)
def test_a_bad_record(
    model: Path, tmp_path: Path, rows: list[object], flags: list[str], parts: list[str]
) -> None:
    data = small.write_jsonl(tmp_path / "data.jsonl", rows)
    given = ("--model", model, "--data", data, "--max-seq-length", 32, *flags)
    for command in (("train", "--adapter-path", tmp_path / "a" / "b"), ("eval",)):
        outcome = small.run(*command, *given)
        assert outcome.code == 2, outcome
        assert outcome.err.startswith("lowtide: ")
        for part in parts:
            assert part in outcome.err, f"{part!r} is not in:\n{outcome.err}"
    assert set(small.tree(tmp_path)) == {"data.jsonl"}


def test_problems_of_the_validation_data_name_its_file(
    model: Path, data: Path, tmp_path: Path
) -> None:
    valid = small.write_jsonl(tmp_path / "v.jsonl", [GOOD, "{"])
    outcome = small.run(
        "train", "--model", model, "--data", data, "--valid-data", valid,
        "--adapter-path", tmp_path / "out", "--max-seq-length", 32,
    )  # fmt: skip
    assert outcome.code == 2
    assert f"{valid} cannot be used" in outcome.err
    assert "line 2" in outcome.err
    assert set(small.tree(tmp_path)) == {"v.jsonl"}
