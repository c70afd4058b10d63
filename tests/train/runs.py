"""Short runs on the small model, and what they must leave behind."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import small
from safetensors.torch import load_file

import lowtide as lt
from lowtide.train.history import TrainResult

WEIGHTS = "adapter_model.safetensors"
LOGS = {"metrics.jsonl", "events.jsonl"}
FILES = {WEIGHTS, "adapter_config.json", "run.yaml", "checkpoints", *LOGS}
CHECKPOINT = {WEIGHTS, "adapter_config.json", "optimizer.safetensors", "state.json"}


def assert_tidy(out: Path, best: bool = False) -> None:
    """A run directory holds its files, whole checkpoints and nothing hidden."""
    assert set(os.listdir(out)) == FILES | ({"best"} if best else set())
    for checkpoint in (out / "checkpoints").iterdir():
        assert re.fullmatch(r"step-\d+", checkpoint.name)
        assert set(os.listdir(checkpoint)) == CHECKPOINT
    if best:
        assert set(os.listdir(out / "best")) == {WEIGHTS, "adapter_config.json"}


def train(model: Path, data: Path, out: Path, observer: Any = None, **given: Any) -> TrainResult:
    base = {"iters": 4, "max_seq_length": 32, "learning_rate": 0.01, **given}
    return lt.train(model=model, data=data, adapter_path=out, observer=observer, **base)


def finite_loss(model: Path, data: Path, out: Path) -> float:
    outcome = small.run(
        "eval", "--model", model, "--data", data, "--adapter-path", out, "--max-seq-length", 32,
        "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    return float(outcome.document["loss"])


def is_untrained(out: Path) -> bool:
    """Whether B is still zero everywhere."""
    weights = load_file(out / "adapter_model.safetensors")
    return not any(bool(t.any()) for name, t in weights.items() if ".lora_B." in name)
