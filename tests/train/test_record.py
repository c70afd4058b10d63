"""What a run records: every key of docs/metrics.md, how it ended, and what it was warned of."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from runs import train

from lowtide.errors import LowtideWarning, TrainingError
from lowtide.runs.lines import Lines, number
from lowtide.runs.processes import process_identity
from lowtide.runs.read import read_run
from lowtide.train.history import StepReport
from lowtide.train.observers import Cost, Quiet

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_updates_and_validations(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = train(model, data, out, iters=5, batch_size=2, valid_data=data, steps_per_eval=2)
    entries = read(out / "metrics.jsonl")
    assert [(e["step"], "loss" in e) for e in entries] == [
        (0, False), (1, True), (2, True), (2, False), (3, True), (4, True), (4, False),
        (5, True), (5, False),
    ]  # fmt: skip
    updates = [e for e in entries if "loss" in e]
    sums = [sum(e["n_tokens"] for e in updates[:n]) for n in range(1, 6)]
    assert [e["total_tokens"] for e in updates] == sums
    assert sums[-1] == result.n_tokens
    elapsed = [e["elapsed_s"] for e in updates]
    assert elapsed == sorted(elapsed)
    assert elapsed[-1] >= sum(e["wall_s"] for e in updates) - 0.01
    assert entries[-1]["valid_loss"] == result.valid_loss
    documented = set(re.findall(r"`(\w+)`", DOCS.read_text().split("## events.jsonl")[0]))
    assert {key for entry in entries for key in entry} <= documented


def test_the_start_says_on_what(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(model, data, out, valid_records=3, memory_budget="8GB")  # that of earlier tests counts
    start, *_, end = read(out / "events.jsonl")
    assert (start["event"], end["event"], end["state"]) == ("start", "end", "finished")
    assert start["machine"]["torch"]
    assert start["model"]["n_parameters"] == 22_432
    assert start["adapter"]["n_parameters"] > 0
    assert (start["data"]["train"]["records"], start["data"]["valid"]["records"]) == (21, 3)
    assert start["data"]["train"]["source"] == str(data)
    assert start["memory_budget_bytes"] == 8_000_000_000
    assert start["process"] == process_identity(start["process"]["pid"])
    assert end["step"] == 4
    assert end["elapsed_s"] > 0
    assert end["cpu_s"] > 0


class Stops(Quiet):
    """Does something after the second update, and keeps what it is told."""

    def __init__(self, what: Any) -> None:
        self.what, self.cost = what, None

    def on_step(self, report: StepReport) -> None:
        if report.step == 2:
            self.what()

    def on_end(self, result: Any, cost: Cost) -> None:
        self.cost = cost


def interrupt() -> None:
    raise KeyboardInterrupt


def break_down() -> None:
    raise TrainingError("the moon fell down.")


def test_an_interrupted_run_says_so(model: Path, data: Path, tmp_path: Path) -> None:
    observer = Stops(interrupt)
    train(model, data, tmp_path / "out", observer=observer)
    end = read(tmp_path / "out" / "events.jsonl")[-1]
    assert (end["state"], end["step"]) == ("interrupted", 2)
    assert observer.cost is not None
    assert observer.cost.elapsed_s <= end["elapsed_s"]


def test_a_failed_run_says_why(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the moon fell down"):
        train(model, data, tmp_path / "out", observer=Stops(break_down))
    end = read(tmp_path / "out" / "events.jsonl")[-1]
    assert (end["state"], end["step"]) == ("failed", 2)
    assert "the moon fell down" in end["error"]


def test_a_resumed_run_counts_on(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(model, data, out, observer=Stops(interrupt))
    before = read(out / "metrics.jsonl")[-1]
    train(model, data, out, resume=True)
    updates = read(out / "metrics.jsonl")
    assert [entry["step"] for entry in updates] == [1, 2, 3, 4]
    assert updates[1] == before
    assert updates[3]["total_tokens"] == sum(entry["n_tokens"] for entry in updates)
    elapsed = [entry["elapsed_s"] for entry in updates]
    assert elapsed == sorted(elapsed)
    events = [(e["event"], e["step"]) for e in read(out / "events.jsonl")]
    assert events == [("start", 0), ("end", 2), ("start", 2), ("end", 4)]
    run = read_run(out)
    assert (run.state, len(run.starts), list(run.steps)) == ("finished", 2, [1, 2, 3, 4])


def test_warnings_are_kept_and_still_shown(model: Path, data: Path, tmp_path: Path) -> None:
    def warn() -> None:
        warnings.warn("the disk is warm <b>", LowtideWarning, stacklevel=1)
        warnings.warn("not ours", UserWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        train(model, data, tmp_path / "out", observer=Stops(warn))
    assert {str(one.message) for one in shown} == {"the disk is warm <b>", "not ours"}
    events = read(tmp_path / "out" / "events.jsonl")
    told = [(e["step"], e["message"]) for e in events if e["event"] == "warning"]
    assert told == [(2, "the disk is warm <b>")]


def test_an_overwritten_run_leaves_none_of_its_lines(
    model: Path, data: Path, tmp_path: Path
) -> None:
    for iters in (6, 3):
        train(model, data, tmp_path / "out", iters=iters, overwrite=True)
    assert len(read(tmp_path / "out" / "metrics.jsonl")) == 3
    assert [e["event"] for e in read(tmp_path / "out" / "events.jsonl")] == ["start", "end"]


def test_damaged_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    good = b'{"a": 1}\n'
    path.write_bytes(
        good + b'{"a": \n' + b"\xff\xfe\x00\n" + b"[1, 2]\n\n" + b"\x00" * 3_000_000 + b"\n"
        + b"[" * 100_000 + b"\n" + good + b'{"a": 1, "b'
    )  # fmt: skip
    lines = Lines(path)
    assert list(lines) == [{"a": 1}, {"a": 1}]
    assert lines.damaged == 6
    assert list(Lines(tmp_path / "absent")) == []


def test_only_finite_numbers_are_numbers() -> None:
    entry = {"a": 3, "b": True, "c": "1", "d": float("nan"), "e": 10**400, "f": None}
    assert number(entry, "a") == 3
    assert [number(entry, key) for key in "bcdefg"] == [None] * 6
