"""The commands on a real pretrained model and real data, where they are present."""

from __future__ import annotations

from pathlib import Path

import pytest
import small
from helpers import asset

STORIES = "models/stories260K/hf-llama"


def test_generate_prints_the_golden_text() -> None:
    golden = asset("models/stories260K/golden_greedy_200.txt").read_text(encoding="utf-8")
    done = small.run("generate", "--model", asset(STORIES), "--max-tokens", 200, "--json")
    assert done.code == 0, done.err
    assert done.document == {"text": golden.rstrip("\n"), "n_tokens": 200}
    assert done.err == golden.rstrip("\n") + "\n"


def test_prose_and_instructions_train(tmp_path: Path) -> None:
    for name, tokens in (
        ("data/wizard_of_oz/wizard_of_oz.txt", 127 * 4 * 2),
        ("data/alpaca_en_demo/alpaca_en_demo.json", None),
    ):
        out = tmp_path / Path(name).stem
        done = small.run(
            "train", "--model", asset(STORIES), "--data", asset(name), "--adapter-path", out,
            "--iters", 2, "--batch-size", 4, "--max-seq-length", 128, "--json",
        )  # fmt: skip
        assert done.code == 0, done.err
        assert 1 < done.document["loss"] < 8
        assert tokens is None or done.document["n_tokens"] == tokens


@pytest.mark.slow
def test_questions_and_answers_train_and_are_evaluated(tmp_path: Path) -> None:
    base = ("--model", asset(STORIES), "--max-seq-length", 512)
    out, few = tmp_path / "out", tmp_path / "few.jsonl"
    lines = (asset("data/gsm8k") / "test.jsonl").read_text(encoding="utf-8").splitlines()
    small.write_jsonl(few, list(lines[:100]))
    train = ("train", *base, "--data", asset("data/gsm8k"), "--adapter-path", out)
    done = small.run(*train, "--iters", 30, "--mask-prompt")
    assert done.code == 0, done.err
    assert "7,472 records" in done.out
    assert "1 dropped with nothing left to train on" in done.out
    losses = [
        small.run(
            "eval", *base, "--data", few, "--batch-size", 16, "--mask-prompt", "--json", *more
        )
        for more in ((), ("--adapter-path", out))
    ]
    assert losses[1].document["loss"] < losses[0].document["loss"]
    assert losses[0].document["n_tokens"] == losses[1].document["n_tokens"]
