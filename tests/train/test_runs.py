"""Whole runs: repeatable, stopped without harm, and never a broken adapter on disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from safetensors.torch import load_file, save_file

import lowtide as lt
from lowtide.errors import LowtideError, OutputError, TrainingError
from lowtide.train.loop import StepReport, Trainer, TrainResult
from lowtide.train.run import Quiet

FILES = {"adapter_model.safetensors", "adapter_config.json", "run.yaml", "metrics.jsonl"}


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


@pytest.mark.parametrize("given", [{}, {"lora_dropout": 0.3, "max_grad_norm": 0.5}])
def test_the_same_seed_gives_the_same_bytes(
    model: Path, data: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        train(model, data, tmp_path / name, seed=seed, batch_size=3, **given)
    a, b, c = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c
    configs = [(tmp_path / n / "adapter_config.json").read_bytes() for n in "ab"]
    assert configs[0] == configs[1]


def test_mesp_and_autograd_runs_agree(model: Path, data: Path, tmp_path: Path) -> None:
    losses = []
    for method in ("mesp", "autograd"):
        train(model, data, tmp_path / method, method=method, iters=8, compute_dtype="float64")
        lines = (tmp_path / method / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    assert losses[0][-1] != losses[0][0]


def test_training_learns_and_says_so(model: Path, data: Path, tmp_path: Path) -> None:
    result = train(
        model, data, tmp_path / "out", iters=40, batch_size=4, valid_data=data, steps_per_eval=40
    )
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert first["step"] == 0
    assert result.valid_loss is not None
    assert result.valid_loss < 0.7 * first["valid_loss"]
    assert finite_loss(model, data, tmp_path / "out") == pytest.approx(result.valid_loss, rel=1e-5)


@pytest.mark.parametrize("save_every", [1, 100])
def test_a_rate_that_is_far_too_high_leaves_a_good_adapter(
    model: Path, data: Path, tmp_path: Path, save_every: int
) -> None:
    out = tmp_path / "out"
    outcome = small.run(
        "train", "--model", model, "--data", data, "--adapter-path", out, "--optimizer", "sgd",
        "--learning-rate", 1e30, "--save-every", save_every, "--max-seq-length", 32,
    )  # fmt: skip
    assert outcome.code == 1
    assert "lowtide: training stopped at step 2: the loss is nan" in outcome.err
    assert "Lower --learning-rate" in outcome.err
    assert f"The adapter in {out} is that of step 0." in outcome.err
    assert set(small.tree(out)) == FILES
    assert finite_loss(model, data, out) < 20
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("valid", [True, False])
def test_the_last_update_is_proved_too(
    model: Path, data: Path, tmp_path: Path, valid: bool
) -> None:
    more = {"valid_data": data} if valid else {}
    with pytest.raises(TrainingError, match="that of step 0"):
        train(
            model, data, tmp_path / "out", iters=1, optimizer="sgd", learning_rate=1e30, **more
        )
    assert is_untrained(tmp_path / "out")
    assert set(small.tree(tmp_path / "out")) == FILES


def test_the_adapter_of_the_last_good_save_is_put_back(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    kept: dict[int, bytes] = {}

    class Breaks(Quiet):
        def on_step(self, report: StepReport) -> None:
            if report.step == 3:
                trainers[-1].adapter.parameters[name].fill_(float("nan"))

        def on_save(self, step: int) -> None:
            kept[step] = (out / "adapter_model.safetensors").read_bytes()

    trainers: list[Trainer] = []
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    remember = Trainer.__init__

    def init(self: Trainer, *given: Any) -> None:
        remember(self, *given)
        trainers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__init__", init)
        with pytest.raises(TrainingError, match=r"step 4: the loss is nan.* of step 2\."):
            train(model, data, out, observer=Breaks(), save_every=1, iters=9)
    assert sorted(kept) == [1, 2, 3]
    assert (out / "adapter_model.safetensors").read_bytes() == kept[2]
    assert set(small.tree(out)) == FILES


def test_a_model_that_holds_nan_is_found_at_once(model: Path, data: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    out = tmp_path / "out"
    train(model, data, out)
    before = small.tree(out)
    base = ("--model", broken, "--max-seq-length", 32, "--data", data)
    outcome = small.run("train", *base, "--adapter-path", out, "--overwrite")
    assert outcome.code == 1
    assert "training stopped at step 1: the loss is nan" in outcome.err
    assert "see that the weights hold no infinite or NaN values" in outcome.err
    assert f"Nothing was written to {out}" in outcome.err
    assert small.tree(out) == before
    outcome = small.run("train", *base, "--adapter-path", tmp_path / "p" / "q")
    assert outcome.code == 1
    assert not (tmp_path / "p").exists()
    outcome = small.run("eval", *base)
    assert outcome.code == 1
    assert "the loss on this data is nan" in outcome.err
    for temperature in (0, 1):
        outcome = small.run("generate", "--model", broken, "--temperature", temperature)
        assert outcome.code == 1
        assert "the model's output is nan, so no token can be chosen" in outcome.err


class Interrupts(Quiet):
    """Presses Ctrl-C where it is told to."""

    def __init__(self, at: str, step: int) -> None:
        self.at, self.step = at, step
        self.stopping = 0
        self.saved: list[int] = []

    def press(self, at: str, step: int) -> None:
        if (at, step) == (self.at, self.step):
            os.kill(os.getpid(), signal.SIGINT)

    def on_step(self, report: StepReport) -> None:
        self.press("step", report.step)

    def on_valid(self, step: int, result: object) -> None:
        self.press("valid", step)

    def on_save(self, step: int) -> None:
        self.saved.append(step)

    def on_stopping(self) -> None:
        self.stopping += 1


@pytest.mark.parametrize(("at", "step"), [("step", 3), ("valid", 2)])
def test_ctrl_c_between_updates_ends_at_once_with_the_adapter_saved(
    model: Path, data: Path, tmp_path: Path, at: str, step: int
) -> None:
    observer = Interrupts(at, step)
    handler = signal.getsignal(signal.SIGINT)
    out = tmp_path / "out"
    result = train(
        model, data, out, observer=observer, iters=9, valid_data=data, steps_per_eval=2
    )
    assert result.interrupted
    assert result.steps == step
    assert observer.saved == [step]
    assert observer.stopping == 0
    assert not is_untrained(out)
    assert set(small.tree(out)) == FILES
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_within_an_update_finishes_it(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Trainer.update

    def pressed(self: Trainer, batches: list[lt.Batch], step: int) -> tuple[float, float | None]:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, batches, step)

    monkeypatch.setattr(Trainer, "update", pressed)
    observer = Interrupts("never", 0)
    result = train(model, data, tmp_path / "out", observer=observer, iters=9)
    assert (result.interrupted, result.steps, observer.stopping) == (True, 2, 1)
    monkeypatch.undo()
    train(model, data, tmp_path / "two", iters=2)
    ours, truth = (tmp_path / n / "adapter_model.safetensors" for n in ("out", "two"))
    assert ours.read_bytes() == truth.read_bytes()


def test_a_second_ctrl_c_stops_within_the_update(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Trainer.update

    def pressed(self: Trainer, batches: list[lt.Batch], step: int) -> tuple[float, float | None]:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, batches, step)

    monkeypatch.setattr(Trainer, "update", pressed)
    result = train(model, data, tmp_path / "out", iters=9)
    assert (result.interrupted, result.steps) == (True, 2)
    assert set(small.tree(tmp_path / "out")) == FILES


def test_ctrl_c_before_the_first_update_leaves_what_was_there(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    train(model, data, out)
    before = small.tree(out)
    result = train(
        model, data, out, observer=Interrupts("valid", 0), valid_data=data, overwrite=True
    )
    assert (result.interrupted, result.steps) == (True, 0)
    assert small.tree(out) == before
    # By the command line, where nothing was there before. Its progress presses Ctrl-C.
    from lowtide.cli.train_command import Progress

    def press(self: Progress, step: int, result: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Progress, "on_valid", press)
    outcome = small.run(
        "train", "--model", model, "--data", data, "--adapter-path", tmp_path / "fresh",
        "--max-seq-length", 32, "--valid-data", data, "--json",
    )  # fmt: skip
    assert outcome.code == 130
    assert outcome.document["interrupted"] is True
    assert outcome.document["loss"] is None  # NaN is no JSON
    assert "interrupted before the first update; nothing was written" in outcome.err
    assert not (tmp_path / "fresh").exists()


def test_a_run_in_a_thread_needs_no_signal_handler(
    model: Path, data: Path, tmp_path: Path
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(train, model, data, tmp_path / "out").result()
    assert result.steps == 4


@pytest.mark.parametrize(
    ("call", "step"),
    # Each file is made durable by two calls, its own and its directory's. First comes run.yaml,
    # then weights and config of each save, those of step 0 first.
    [(1, None), (2, None), (3, None), (4, None), (6, None), (7, 0), (8, 0), (9, 0), (10, 0),
     (11, 1), (12, 1), (13, 1), (14, 1)],
)  # fmt: skip
def test_a_disk_that_fills_while_saving_keeps_the_adapter_before(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    call: int, step: int | None,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    fsync, made = os.fsync, [0]

    def full(descriptor: int) -> None:
        made[0] += 1
        if made[0] >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LowtideError) as error:
        train(model, data, out, save_every=1, iters=9)
    monkeypatch.undo()
    text = str(error.value)
    assert "No space left on device. Free some space" in text
    if step is None:
        assert call < 3 or f"Nothing was written to {out}" in text
        assert not out.exists()
        return
    assert f"The adapter in {out} is that of step {step}." in text
    assert set(small.tree(out)) == FILES
    truth = tmp_path / "truth"
    train(model, data, truth, iters=max(1, step))
    same = [(d / "adapter_model.safetensors").read_bytes() for d in (out, truth)]
    assert is_untrained(out) if step == 0 else same[0] == same[1]


def test_ctrl_c_while_saving_leaves_no_half_file(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, made = os.fsync, [0]

    def pressed(descriptor: int) -> None:
        made[0] += 1
        if made[0] == 7:  # in the midst of the save of step 1
            os.kill(os.getpid(), signal.SIGINT)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", pressed)
    result = train(model, data, tmp_path / "out", save_every=1)
    assert (result.interrupted, result.steps) == (True, 1)
    assert set(small.tree(tmp_path / "out")) == FILES
    assert not is_untrained(tmp_path / "out")


def test_a_file_system_without_links_keeps_a_copy(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(TrainingError, match="that of step 0"):
        train(model, data, tmp_path / "out", save_every=1, optimizer="sgd", learning_rate=1e30)
    assert is_untrained(tmp_path / "out")
    assert set(small.tree(tmp_path / "out")) == FILES


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "none", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_real_disk_that_is_too_small(model: Path, data: Path, small_disk: Path) -> None:
    with pytest.raises(OutputError, match=r"has 1\.\d MB free, .* needs \d\.\d MB"):
        train(model, data, small_disk / "out", lora_r=128)
    assert small.tree(small_disk) == {}


def test_a_real_disk_that_fills_during_the_run(model: Path, data: Path, small_disk: Path) -> None:
    out = small_disk / "out"

    class Fills(Quiet):
        def on_step(self, report: StepReport) -> None:
            if report.step == 3:
                try:
                    with open(small_disk / "filler", "wb", buffering=0) as file:
                        while True:
                            file.write(b"x" * 1000)
                except OSError:
                    pass

    with pytest.raises(TrainingError, match=r"No space left on device.* that of step 2\."):
        train(model, data, out, observer=Fills(), save_every=1, iters=9)
    assert set(small.tree(out)) == FILES
    (small_disk / "filler").unlink()
    finite_loss(model, data, out)


def test_the_saved_adapter_is_that_of_the_trainer(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(model, data, out, lora_r=3, target_modules="v_proj,up_proj", lora_alpha=5)
    adapter = lt.Adapter.load(out, lt.load_model(model))
    assert adapter.config.r == 3
    assert adapter.config.scale == 5 / 3
    assert len(adapter.parameters) == 2 * 2 * 2
    saved = json.loads((out / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(model)
    assert saved["target_modules"] == ["v_proj", "up_proj"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps(model: Path, data: Path, tmp_path: Path) -> None:
    done = small.run_process(
        "train", "--model", model, "--data", data, "--adapter-path", tmp_path / "out",
        "--iters", 600, "--max-seq-length", 48, "--valid-records", 4, "--steps-per-eval", 150,
        "--save-every", 70, "--batch-size", 2, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    peaks = [json.loads(line)["peak_anon_bytes"] for line in lines if "valid_loss" not in line]
    assert len(peaks) == 600
    assert max(peaks[-100:]) - max(peaks[:100]) < 1_000_000
    assert torch.tensor(peaks).min() > 0
