"""Runs that Ctrl-C or a full disk ends: what was good stays, and nothing half done is left."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import small
import torch
from runs import assert_tidy, finite_loss, is_untrained, train
from safetensors.torch import load_file

import lowtide as lt
from lowtide.errors import LowtideError, OutputError, TrainingError
from lowtide.train import run_dir
from lowtide.train.history import StepReport
from lowtide.train.loop import Trainer
from lowtide.train.run import Quiet


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
    result = train(model, data, out, observer=observer, iters=9, valid_data=data, steps_per_eval=2)
    assert result.interrupted
    assert result.steps == result.saved_step == step
    assert observer.saved[-1] == step
    assert observer.stopping == 0
    assert not is_untrained(out)
    assert_tidy(out, best=True)
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
    assert_tidy(tmp_path / "out")


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


def test_a_run_in_a_thread_needs_no_signal_handler(model: Path, data: Path, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(train, model, data, tmp_path / "out").result()
    assert result.steps == 4


@pytest.mark.parametrize(
    ("call", "step"),
    # First comes run.yaml (2 calls), then the checkpoint of step 0 (8: metrics, directory, four
    # files, two directories), which is put in place by 5; from then on 8 and 2 by turns.
    [(1, None), (3, None), (10, None), (16, 0), (19, 0), (23, 0), (26, 1), (31, 1)],
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
    assert f"The adapter in {out} is that of step {step}. Go on from step {step} " in text
    assert_tidy(out)
    truth = tmp_path / "truth"
    train(model, data, truth, iters=max(1, step))
    same = [(d / "adapter_model.safetensors").read_bytes() for d in (out, truth)]
    assert is_untrained(out) if step == 0 else same[0] == same[1]


@pytest.mark.parametrize(("line", "kept"), [(1, None), (2, None), (3, 0), (4, 0)])
def test_a_disk_that_fills_while_logging_says_what_is_kept(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: int,
    kept: int | None,
) -> None:
    dumps, made = json.dumps, [0]

    def full(value: object) -> str:
        made[0] += isinstance(value, dict) and "step" in value
        if made[0] == line:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return dumps(value)

    monkeypatch.setattr(run_dir, "json", SimpleNamespace(dumps=full))
    out = tmp_path / "out"
    with pytest.raises(LowtideError, match="No space left on device") as error:
        train(model, data, out, valid_data=data)
    if kept is None:  # the first line is that of the start, before any step
        assert line == 1 or f"Nothing was written to {out}" in str(error.value)
        assert not out.exists()
    else:
        assert f"The adapter in {out} is that of step {kept}." in str(error.value)
        assert_tidy(out, best=True)
        assert is_untrained(out)


def test_ctrl_c_while_saving_leaves_no_half_file(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, made = os.fsync, [0]

    def pressed(descriptor: int) -> None:
        made[0] += 1
        if made[0] == 19:  # in the midst of the save of step 1
            os.kill(os.getpid(), signal.SIGINT)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", pressed)
    result = train(model, data, tmp_path / "out", save_every=1)
    assert (result.interrupted, result.steps) == (True, 1)
    assert_tidy(tmp_path / "out")
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
    assert_tidy(tmp_path / "out")


def test_a_real_disk_that_is_too_small(model: Path, data: Path, small_disk: Path) -> None:
    with pytest.raises(OutputError, match=r"has 1\.\d MB free, .* need \d\.\d MB"):
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
    assert_tidy(out)
    (small_disk / "filler").unlink()
    finite_loss(model, data, out)


class Changes(Quiet):
    """Does something to the weights after a step."""

    def __init__(self, step: int, change: Callable[[], object]) -> None:
        self.step, self.change = step, change

    def on_step(self, report: StepReport) -> None:
        if report.step == self.step:
            self.change()


def _replace(weights: Path) -> None:
    other = weights.with_name("other")
    other.write_bytes(weights.read_bytes())
    other.replace(weights)


def _write(weights: Path) -> None:
    with open(weights, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"xx")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_replace, "was replaced by another file"),
        (_write, "was written to in place"),
        (Path.unlink, "is gone"),
    ],
)
def test_weights_that_change_during_training_end_the_run(
    model: Path, data: Path, tmp_path: Path, change: Callable[[Path], object], found: str
) -> None:
    mine = Path(shutil.copytree(model, tmp_path / "model"))
    weights, out = mine / "model.safetensors", tmp_path / "out"
    observer = Changes(3, lambda: change(weights))
    with pytest.raises(TrainingError) as error:
        train(mine, data, out, observer=observer, iters=9, save_every=2)
    told = str(error.value)
    assert "training stopped at step 4: the model's weights changed" in told
    assert f"{weights} {found}" in told
    assert f"The adapter in {out} is that of step 2." in told
    reference = tmp_path / "reference"
    train(model, data, reference, iters=9, save_every=2, observer=Interrupts("step", 2))
    saved, expected = (load_file(d / "adapter_model.safetensors") for d in (out, reference))
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
