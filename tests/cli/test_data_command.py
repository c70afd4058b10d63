"""`lowtide data check`: every number against a count made here, and what training would refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small

from lowtide.data.tokenizer import Tokenizer


def check(model: Path, data: Path, *more: object) -> small.Outcome:
    return small.run("data", "check", data, "--model", model, "--max-seq-length", 32, *more)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    texts = ["short", "a somewhat longer text", "x" * 60, "short", "y" * 40]
    return small.write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in texts])


def test_what_is_counted(model: Path, rows: Path) -> None:
    outcome = check(model, rows, "--json")
    assert outcome.code == 0, outcome.err
    tokenizer = Tokenizer.load(model)
    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    lengths = [len(tokenizer.encode(text)) + 1 for text in texts]  # and EOS
    train = outcome.document["splits"]["train"]
    assert train["records"] == 5
    assert train["tokens"] == sum(lengths)
    assert train["kept_tokens"] == sum(min(32, n) for n in lengths)
    assert train["trained_tokens"] == sum(min(32, n) - 1 for n in lengths)
    assert {int(n): count for n, count in train["lengths"].items()} == {
        n: lengths.count(n) for n in lengths
    }
    assert train["over_long"] == 2
    assert train["over_long_examples"] == [f"line {i + 1}: {lengths[i]} tokens" for i in (2, 4)]
    assert train["duplicates"] == 1
    assert train["duplicate_examples"] == ["line 4 is the same as line 1"]
    assert outcome.document["usable"] is True
    time = outcome.document["time"]
    assert time["batches"] == 5
    assert time["epoch_s"] == pytest.approx(train["kept_tokens"] / time["tokens_per_s"])


def test_it_looks_good(model: Path, rows: Path) -> None:
    outcome = check(model, rows, "--no-estimate-time")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == f"train  {rows}"
    assert any("median" in line and "longest" in line for line in lines)
    bars = [line for line in lines if "█" in line or "#" in line]
    assert sum(int(line.split("<-")[0].split()[-1]) for line in bars) == 5
    assert sum("<- --max-seq-length" in line for line in lines) <= 1
    assert lines[-1] == "the data can be trained on; look at: records that are cut, duplicates"
    assert max(map(len, lines)) < 120 + len(str(rows))


def test_problems_are_counted_and_named_by_line(model: Path, tmp_path: Path) -> None:
    good = [{"prompt": f"question {i}", "completion": "answer"} for i in range(3)]
    bad: list[object] = [
        "{", {"prompt": "a", "completion": ""}, {"text": "b"}, {"prompt": 1, "completion": "c"},
        *[{"prompt": "", "completion": "d"}] * 9,
    ]  # fmt: skip
    data = small.write_jsonl(tmp_path / "d.jsonl", [*good, *bad])
    outcome = check(model, data, "--json")
    assert outcome.code == 1
    train = outcome.document["splits"]["train"]
    assert train["records"] == 3
    assert train["problems"] == {
        "not JSON": 1, "empty": 10, "of another format": 1, "not as expected": 1,
    }  # fmt: skip
    assert train["examples"]["not JSON"][0].startswith("line 4: not valid JSON")
    assert train["examples"]["empty"][0] == "line 5: 'completion' is empty"
    assert len(train["examples"]["empty"]) == 10
    assert outcome.document["usable"] is False
    text = check(model, data, "--no-estimate-time").out
    assert "line 6: found the keys 'text'" in text
    assert "and 5 more" in text
    assert text.endswith(
        "training would refuse this data: mend or remove the records named above\n"
    )


def test_templates_and_masks(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    system = {"role": "system", "content": "be kind"}
    long = [{"role": "user", "content": "long " * 20}, turns[1]]
    data = small.write_jsonl(
        tmp_path / "d.jsonl", [{"messages": m} for m in (turns, [system, *turns], long)]
    )
    outcome = check(model, data, "--json", "--chat-template", template, "--mask-prompt")
    assert outcome.code == 1
    train = outcome.document["splits"]["train"]
    assert train["problems"] == {"not expressible in the chat template": 1}
    assert "line 2: " in next(iter(train["examples"].values()))[0]
    assert (train["records"], train["untrained"]) == (2, 1)
    assert train["kept_lengths"] == {"24": 1}, "what training leaves out takes it no time"


def test_splits_that_share_records(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, texts in (("train", "abc"), ("valid", "cde"), ("test", "fg")):
        small.write_jsonl(folder / f"{name}.jsonl", [{"text": text} for text in texts])
    outcome = check(model, folder, "--json", "--no-estimate-time")
    assert outcome.code == 0
    assert outcome.document["shared"] == {"valid": 1, "test": 0}
    assert "1 of 3 valid records are in train too" in outcome.err


def test_files_that_cannot_be_read_to_their_end(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "d.txt"
    data.write_bytes(b"good text\n\xff")
    outcome = check(model, data)
    assert outcome.code == 1
    assert "is not UTF-8: byte 0xff on line 2" in outcome.out
    for path, message in ((tmp_path / "nothing", "no data at"), (tmp_path, "holds no train.jsonl")):
        outcome = check(model, path)
        assert (outcome.code, message in outcome.err) == (2, True), outcome


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chek", "d.jsonl"), "unknown command 'data chek'; did you mean 'check'?"),
        (("check", "d.jsonl", "extra"), "unknown argument 'extra'"),
        (("check",), "--data is required"),
    ],
)
def test_wrong_commands(arguments: tuple[str, ...], message: str) -> None:
    outcome = small.run("data", *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert small.run("data", "--help").code == 0
    assert small.run("data").code == 2


def test_nothing_is_written(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = small.tree(tmp_path)
    assert check(model, rows, "--no-estimate-time").code == 0
    assert small.tree(tmp_path) == before
