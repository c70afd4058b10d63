"""`lowtide train --dry-run` tells what a run would do, does one update, and writes nothing."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest
import small


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    answers = [(f"What comes after {i}?", f"{i + 1}\x1b[2J!") for i in range(4)]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in answers]
    return small.write_jsonl(tmp_path / "d.jsonl", rows)


def arguments(model: Path, data: Path, out: Path, *more: object) -> tuple[object, ...]:
    return (
        "train", "--model", model, "--data", data, "--adapter-path", out, "--max-seq-length", 64,
        "--dry-run", *more,
    )  # fmt: skip


def test_what_is_shown_and_left(
    model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = small.tree(tmp_path)
    outcome = small.run(
        *arguments(model, chats, tmp_path / "out", "--mask-prompt", "--batch-size", 2)
    )
    assert outcome.code == 0, outcome.err
    assert small.tree(tmp_path) == before
    assert "  masked   | <|im_start|>user\\nWhat comes after 0?<|im_end|>\\n<|im" in outcome.out
    assert "  trained  | 1\\x1b[2J!<|im_end|>\n  masked   | \\n" in outcome.out
    assert "\x1b" not in outcome.out, "data must not command the terminal"
    assert re.search(r"plan     predicted peak [\d.]+ MB for the largest .*\(128 tok", outcome.out)
    assert re.search(r"step     one update of 2 of them: loss [\d.]+ over \d+ tokens", outcome.out)
    assert "nothing was written; leave --dry-run out to train" in outcome.out


def test_the_document(model: Path, chats: Path, tmp_path: Path) -> None:
    given = ("--mask-prompt", "--batch-size", 4, "--learning-rate", 0.01)
    outcome = small.run(*arguments(model, chats, tmp_path / "out", *given, "--json"))
    document = outcome.document
    runs = document["sample"][0]["runs"]
    assert [trained for trained, _ in runs] == [False, True, False]
    trained = [text for flag, text in runs if flag]
    assert trained == ["1\x1b[2J!<|im_end|>"]
    assert sum(document["by_kind"].values()) == document["predicted_peak_bytes"]
    # The loss is the first one of a run that makes the same batch of all records.
    words = arguments(model, chats, tmp_path / "run", *given)
    rest = [word for word in words if word != "--dry-run"]
    assert small.run(*rest, "--iters", 1).code == 0
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert document["step"]["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert document["step"]["n_tokens"] == first["n_tokens"]
    outcome = small.run(*words, "--resume")
    assert outcome.code == 2
    assert "--dry-run tries a new run, --resume goes on with one" in outcome.err


def test_in_colour_on_a_terminal(model: Path, chats: Path, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    words = arguments(model, chats, tmp_path / "out", "--mask-prompt")
    child = subprocess.Popen(
        small.command(*words), stdout=follower, stderr=subprocess.PIPE,
        env=small.environment(TERM="xterm-256color", COLUMNS="100", NO_COLOR=""),
    )  # fmt: skip
    os.close(follower)
    seen = b""
    while True:
        try:
            seen += os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
    assert child.wait() == 0
    os.close(leader)
    text = seen.decode()
    assert "\x1b[1;32m1\\x1b[2J!<|im_end|>" in text
    assert "\x1b[2m" in text


def test_what_a_run_would_refuse_is_refused(model: Path, chats: Path, tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.mkdir()
    (held / "adapter_config.json").write_text("{}")
    for more, message in (
        (("--adapter-path", held), "already holds a run"),
        (("--memory-budget", "1KB"), "too small"),
        (("--valid-data", tmp_path / "none.jsonl"), "no data at"),
        (("--early-stopping-patience", 2), "there is no validation data"),
    ):
        outcome = small.run(*arguments(model, chats, tmp_path / "out", *more))
        assert outcome.code == 2, outcome
        assert message in outcome.err, outcome.err
    assert {p.name for p in tmp_path.iterdir()} == {"held", "d.jsonl"}
