"""`--report-to`: TensorBoard's event files, wandb's calls, and neither unless it is asked for."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small
from runs import train
from tensorboardX.proto.event_pb2 import Event
from test_stopped_runs import Interrupts

from lowtide.train import trackers


def events(directory: Path) -> Iterator[Any]:
    """Records of TensorBoard's files: length, checksum, content, checksum."""
    for path in sorted(directory.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_reads_what_metrics_jsonl_has(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(
        model, data, out, report_to="tensorboard", valid_data=data, steps_per_eval=2,
        sample_prompt="One", steps_per_sample=4,
    )  # fmt: skip
    found: dict[str, dict[int, float]] = {}
    texts = set()
    for event in events(out / "tensorboard"):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, {})[event.step] = value.simple_value
            else:
                texts.add(value.tag.split("/")[0])
    entries = metrics(out)
    for tag, key in (("train/loss", "loss"), ("valid/loss", "valid_loss"),
                     ("train/learning_rate", "learning_rate"),
                     ("train/peak_anon_bytes", "peak_anon_bytes")):  # fmt: skip
        wanted = {entry["step"]: entry[key] for entry in entries if key in entry}
        assert found[tag] == pytest.approx(wanted, rel=1e-6)  # it keeps float32
    assert {tag for tag in found if tag.startswith("grad_norms/")} == {
        "grad_norms/layer_00", "grad_norms/layer_01",
    }  # fmt: skip
    assert texts == {"settings", "sample"}


class Recorded:
    """Stands in for wandb: keeps its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def init(self, **given: Any) -> Any:
        self.calls.append(("init", given))
        return SimpleNamespace(
            log=lambda values, step: self.calls.append(("log", (step, values))),
            finish=lambda: self.calls.append(("finish", None)),
        )


def test_wandb_is_told_the_same(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    out = tmp_path / "out"
    train(model, data, out, report_to=["wandb"], sample_prompt="One", steps_per_sample=4)
    (kind, given), *logged, last = wandb.calls
    assert (kind, last) == ("init", ("finish", None))
    assert (given["dir"], given["name"], given["config"]["lora_r"]) == (str(out), "out", 8)
    told = [values for _, (step, values) in logged if "train/loss" in values]
    assert [values["train/loss"] for values in told] == [
        entry["loss"] for entry in metrics(out) if "loss" in entry
    ]
    steps = [step for _, (step, _) in logged]
    assert steps == sorted(steps)
    samples = [entry["sample"]["text"] for entry in metrics(out) if "sample" in entry]
    assert [v["sample/One"] for _, (_, v) in logged if "sample/One" in v] == samples


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails(Recorded):
        def init(self, **given: Any) -> Any:
            run = super().init(**given)
            log = run.log

            def fail(values: Any, step: int) -> None:
                if step == 2:
                    raise ConnectionError("no network")
                log(values, step)

            run.log = fail
            return run

    wandb = Fails()
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    outcome = small.run(
        "train", "--model", model, "--data", data, "--adapter-path", tmp_path / "out", "--iters", 4,
        "--max-seq-length", 32, "--report-to", "wandb",
    )  # fmt: skip
    assert outcome.code == 0
    said = "wandb failed and is told nothing more: ConnectionError: no network"
    assert outcome.err == f"lowtide: {said}\n"
    assert [kind for kind, _ in wandb.calls] == ["init", "log"]
    assert said in (tmp_path / "out" / "events.jsonl").read_text()
    assert len(metrics(tmp_path / "out")) == 4


def test_what_is_not_there_is_said_with_the_command_that_brings_it(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wandb", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    outcome = small.run(
        "train", "--model", model, "--data", data, "--adapter-path", tmp_path / "out",
        "--report-to", "tensorboard, wandb,mlflow",
    )  # fmt: skip
    assert outcome.code == 2
    assert "pip install tensorboardX" in outcome.err
    assert "pip install wandb" in outcome.err
    assert "'mlflow' is not known; choose tensorboard, wandb" in outcome.err
    assert not (tmp_path / "out").exists()


def test_nothing_is_imported_unasked(model: Path, data: Path, tmp_path: Path) -> None:
    code = (
        "import sys, lowtide as lt\n"
        "lt.train(model=sys.argv[1], data=sys.argv[2], adapter_path=sys.argv[3], iters=1,\n"
        "         max_seq_length=32)\n"
        "print({'tensorboardX', 'tensorboard', 'wandb', 'tensorflow'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), str(data), str(tmp_path / "out")],
        capture_output=True, text=True, check=False, env=small.environment(),
    )  # fmt: skip
    assert done.stdout == "set()\n", done.stderr


def test_names() -> None:
    assert trackers.wanted_trackers(None) == []
    assert trackers.wanted_trackers("none") == []
    assert trackers.wanted_trackers("tensorboard, tensorboard") == ["tensorboard"]


def test_a_replaced_run_leaves_nothing_of_its_own(model: Path, data: Path, tmp_path: Path) -> None:
    """Not its page, nor its curves in TensorBoard, which would be drawn into those of the new."""
    out = tmp_path / "out"
    train(model, data, out, report_to="tensorboard", iters=3)
    assert small.run("report", out).code == 0
    (out / "notes.txt").write_text("mine")
    before = small.tree(out)
    interrupted = Interrupts("valid", 0)
    train(model, data, out, interrupted, valid_data=data, overwrite=True, report_to="tensorboard")
    assert small.tree(out) == before  # a run that did not come to an update replaces nothing
    train(model, data, out, overwrite=True, report_to="tensorboard", iters=2)
    assert not (out / "report.html").exists()
    assert len(list((out / "tensorboard").iterdir())) == 1
    assert {event.step for event in events(out / "tensorboard") if event.step} == {1, 2}
    train(model, data, out, overwrite=True, iters=1)
    assert not (out / "tensorboard").exists()
    assert (out / "notes.txt").read_text() == "mine"
