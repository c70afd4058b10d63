"""Output on disks that are read-only, or become so, or vanish: real mounts, which need root."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import small
from runs import WEIGHTS, assert_tidy, finite_loss, train

import lowtide as lt
from lowtide.errors import LowtideError, OutputError, TrainingError
from lowtide.train import output
from lowtide.train.history import StepReport
from lowtide.train.observers import Quiet


def read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def writable(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


def pull_out(disk: Path) -> None:
    subprocess.run(["umount", "-l", str(disk)], check=True)


class At(Quiet):
    """Does something after an update."""

    def __init__(self, step: int, do: Callable[[], None]) -> None:
        self.step, self.do = step, do

    def on_step(self, report: StepReport) -> None:
        if report.step == self.step:
            self.do()


@pytest.mark.parametrize("name", ["", "out", "not/yet/there"])
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_read_only_disk_is_refused_before_anything(
    name: str, more: tuple[str, ...], model: Path, data: Path, small_disk: Path
) -> None:
    read_only(small_disk)
    out = small_disk / name
    outcome = small.run("train", "--model", model, "--data", data, "--adapter-path", out, *more)
    assert outcome.code == 2
    assert outcome.err == (
        f"lowtide: --adapter-path {out} cannot be written: Read-only file system. Its disk is "
        "mounted read-only: mount it for writing, or choose another.\n"
    )
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_becomes_read_only_keeps_what_it_has(
    model: Path, data: Path, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kernel does with a disk that fails; mount(8) would not while the lock's file is open."""
    monkeypatch.setattr(output, "locked", lambda directory: nullcontext())
    settings = {"iters": 6, "save_every": 2}
    train(model, data, tmp_path / "whole", **settings)
    out = small_disk / "out"
    with pytest.raises(
        TrainingError,
        match=r"step 5: .*Read-only file system.*is that of step 2\. Go on from step 2",
    ):
        train(model, data, out, At(3, lambda: read_only(small_disk)), **settings)
    finite_loss(model, data, out)
    with pytest.raises(OutputError, match="mount it for writing"):
        lt.train(adapter_path=out, resume=True)
    writable(small_disk)
    lt.train(adapter_path=out, resume=True)
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert_tidy(out)


@pytest.mark.parametrize("name", ["", "out"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_disk_that_vanishes_is_told_and_its_mount_point_left_alone(
    name: str, step: int, model: Path, data: Path, small_disk: Path
) -> None:
    """Also where the output directory is the mount point, which is there, and empty, afterwards."""
    out = small_disk / name
    gone = At(step, lambda: pull_out(small_disk))
    with pytest.raises(LowtideError, match=r"The directory or its disk is gone"):
        train(model, data, out, gone, iters=6, save_every=2)
    assert not small_disk.is_mount()
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_comes_back_goes_on(
    model: Path, data: Path, tmp_path: Path, small_disk: Path
) -> None:
    """A disk is pulled out and put in again; what it held is a run that can be resumed."""
    settings = {"iters": 6, "save_every": 2}
    train(model, data, tmp_path / "whole", **settings)
    aside = tmp_path / "aside"
    aside.mkdir()
    subprocess.run(["mount", "--bind", str(small_disk), str(aside)], check=True)
    try:
        with pytest.raises(TrainingError, match=r"disk is gone"):
            train(model, data, small_disk, At(3, lambda: pull_out(small_disk)), **settings)
        lt.train(adapter_path=aside, resume=True)
        weights = (aside / WEIGHTS).read_bytes()
        assert weights == (tmp_path / "whole" / WEIGHTS).read_bytes()
        assert_tidy(aside)
    finally:
        subprocess.run(["umount", str(aside)], check=True)
