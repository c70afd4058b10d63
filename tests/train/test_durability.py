"""Whatever a disk does, a checkpoint that was saved is found again, whole."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from disk import Crash, Disk
from runs import WEIGHTS

import lowtide as lt
from lowtide.config import build
from lowtide.errors import OutputError
from lowtide.train.checkpoints import Checkpoint, Checkpoints
from lowtide.train.history import History
from lowtide.train.output import made_directory
from lowtide.train.run_dir import Identity, RunDir
from lowtide.train.settings import TrainSettings

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
LAST, BEST = 4, (1, 3)
"""Updates of the whole run, and those after which validation is the best so far."""


class Run:
    """A run without a model: parameters and state after a step are the step's number."""

    def __init__(self, root: Path) -> None:
        given = {"model": "-", "data": "-", "adapter_path": str(root), "keep_checkpoints": 2}
        self.identity = Identity(build(TrainSettings, given), {"model": "m"}, {"tiles": "full"})
        self.root = root
        self.promised = -1
        """Of the last step whose save has returned, with its files in place."""
        self.promises: list[tuple[int, int]] = []
        """(calls, step): from so many calls of the disk on, the step is promised."""
        self.calls: Callable[[], int] = lambda: 0

    def adapter(self, step: int) -> lt.Adapter:
        shapes = {NAME.format("A"): (2, 5), NAME.format("B"): (4, 2)}
        return lt.Adapter(lt.LoraConfig(r=2), {n: torch.full(s, step) for n, s in shapes.items()})

    def promise(self, run_dir: RunDir) -> None:
        if run_dir.resumable_step is not None and run_dir.resumable_step > self.promised:
            self.promised = run_dir.resumable_step
            self.promises.append((self.calls(), self.promised))

    def go(self, resumed: Checkpoint | None = None, last: int = LAST) -> None:
        """Make the updates that are left."""
        history = History(**resumed.state.history) if resumed else History()
        run_dir = RunDir(self.root, self.identity, resumed)
        try:
            run_dir.log({"event": "start"}, "events.jsonl")
            if resumed is None:
                self.save(run_dir, history)
            for step in range(history.step + 1, last + 1):
                run_dir.confirm()
                self.promise(run_dir)
                history.step = step
                run_dir.log({"step": step})
                if step in BEST:
                    history.best_step = step
                self.save(run_dir, history)
            run_dir.confirm()
            self.promise(run_dir)
        finally:
            run_dir.close()

    def save(self, run_dir: RunDir, history: History) -> None:
        state = {"moments.0": torch.full((3,), history.step)}
        run_dir.save(self.adapter(history.step), state, {"epoch": 0, "offset": 0}, history)
        self.promise(run_dir)


def resumed_to_the_end(root: Path, promised: int, truth: Path) -> int:
    """Check what is left in a directory, then finish the run; the step that was found."""
    found, damaged = Checkpoints(root).newest()
    assert damaged == []
    run = Run(root)
    if promised >= 0:
        assert found is not None
        assert found.state.step >= promised
        for place in (root, *([root / "best"] if (root / "best" / WEIGHTS).exists() else [])):
            if (place / WEIGHTS).exists():
                assert (place / WEIGHTS).read_bytes() in adapters(truth), place
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that lines of metrics were lost
        with made_directory(root):
            run.go(found)
    for name in (WEIGHTS, "adapter_config.json", f"best/{WEIGHTS}"):
        assert (root / name).read_bytes() == (truth / name).read_bytes()
    steps = [json.loads(line)["step"] for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, LAST + 1))
    kept = {path.name for path in (root / "checkpoints").iterdir()}
    assert kept >= {f"step-{LAST - 1}", f"step-{LAST}"}
    return -1 if found is None else found.state.step


def adapters(truth: Path) -> set[bytes]:
    return {path.read_bytes() for path in (truth / "all").iterdir()}


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, and the adapter of each of its steps."""
    root = tmp_path_factory.mktemp("truth")
    run = Run(root)
    run.go()
    (root / "all").mkdir()
    for step in range(LAST + 1):
        run.adapter(step).save(root / "one")
        (root / "one" / WEIGHTS).rename(root / "all" / str(step))
    assert (root / WEIGHTS).read_bytes() == (root / "all" / str(LAST)).read_bytes()
    assert (root / f"best/{WEIGHTS}").read_bytes() == (root / "all" / "3").read_bytes()
    return root


def test_every_state_that_a_power_cut_may_leave_can_be_resumed(
    tmp_path: Path, truth: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    root.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(root, patch)
        run = Run(root)
        run.calls = lambda: len(disk.operations)
        run.go(last=2)
        run.go(Checkpoints(root).newest()[0])
    states: dict[tuple[object, ...], Crash] = {}
    for crash in disk.crashes():
        promised = max([step for calls, step in run.promises if calls <= crash.operations] or [-1])
        states.setdefault((promised, *sorted(crash.tree.items())), crash)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # of the many runs that follow
    found = {
        resumed_to_the_end(crash.write(tmp_path / str(number)), int(str(key[0])), truth)
        for number, (key, crash) in enumerate(states.items())
    }
    assert len(states) > 500
    assert found == {-1, *range(LAST + 1)}


def ended_with(work: Callable[[], None]) -> str | None:
    try:
        work()
    except OutputError as error:
        return str(error)
    return None


def test_a_disk_that_is_full_at_any_call_loses_no_checkpoint(tmp_path: Path, truth: Path) -> None:
    call = 0
    while True:
        call += 1
        root = tmp_path / str(call)
        root.mkdir()
        run = Run(root)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(root, patch, full_at=call)
            told = ended_with(run.go)
        if told is None:
            break
        assert "No space left on device. Free some space" in told
        resumed_to_the_end(root, run.promised, truth)
    assert disk.calls == call - 1 > 100
