"""The files of a run: checkpoints, the last good adapter, the best one, settings and metrics."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lowtide.errors import LowtideWarning, TrainingError
from lowtide.export.peft import CONFIG_FILE, WEIGHTS_FILE
from lowtide.model.adapter import Adapter
from lowtide.settings_file import to_yaml
from lowtide.weights.writer import link_atomically, sync_directory, write_atomically

from .checkpoints import FOLDER, Checkpoint, Checkpoints, RunState, file_checksum
from .history import History
from .output import (
    BEST_FOLDER,
    EVENTS_FILE,
    HIDDEN,
    LEFT_BY_OTHERS,
    METRICS_FILE,
    SETTINGS_FILE,
    TENSORBOARD_FOLDER,
    unwritable,
)
from .settings import TrainSettings


@dataclass(frozen=True)
class Identity:
    """What does not change in a run, as its checkpoints say it."""

    settings: TrainSettings
    fingerprints: dict[str, str | None]
    arithmetic: dict[str, str]

    @property
    def base_model(self) -> str:
        """What adapter_config.json says."""
        return self.settings.model


class RunDir:
    """Writes a run's files. The adapter in the output directory is always one that proved good.

    Whether saved parameters are good is known only when the next loss is finite. So `save` writes
    a checkpoint, and `confirm` gives its adapter a second name in the output directory, and one in
    `best` if it is the best so far. `roll_back` removes a checkpoint that did not prove good. Until
    the first `confirm` everything lies in a hidden directory, and what the output directory held
    before is untouched.
    """

    def __init__(
        self, directory: Path, identity: Identity, resumed: Checkpoint | None = None
    ) -> None:
        """Write run.yaml: of a new run to the hidden directory, of a resumed one in place.

        Args:
            directory: where the adapter goes.
            identity: what run.yaml and the checkpoints say of the run.
            resumed: the checkpoint that the run goes on from; None starts a new run.

        Raises:
            OutputError: the directory cannot be written.
        """
        self.directory = directory
        self.saved_step: int | None = None
        """The step that was last saved, hidden or in place."""
        self.step_in_place: int | None = None
        """The step whose adapter lies in the output directory; None where that is not known."""
        self._identity = identity
        self._keep = identity.settings.keep_checkpoints
        self._pending: _Pending | None = None
        self._hidden: Path | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._place = _place(directory)
            if resumed is None:
                self._hidden = Path(tempfile.mkdtemp(prefix=HIDDEN, dir=directory))
            else:
                self._take_up(resumed)
        except OSError as error:
            raise unwritable(directory, error) from error
        try:
            saved = replace(identity.settings, resume=False, resume_anyway=False, overwrite=False)
            write_atomically(self.root / SETTINGS_FILE, [to_yaml(saved).encode()])
        except BaseException:
            self.close()
            raise

    @property
    def resumable_step(self) -> int | None:
        """The step of the newest checkpoint; None while everything is hidden."""
        return self.saved_step if self._hidden is None else None

    @property
    def root(self) -> Path:
        """Where files of the run lie now; those that are open move along."""
        return self._hidden or self.directory

    @property
    def _checkpoints(self) -> Checkpoints:
        return Checkpoints(self.root)

    def _take_up(self, resumed: Checkpoint) -> None:
        """Make the directory what it was when the checkpoint was written."""
        step = resumed.state.step
        self._checkpoints.set_aside(step)
        with open(self.directory / METRICS_FILE, "ab") as metrics:
            if metrics.tell() < resumed.state.metrics_bytes:
                warnings.warn(
                    f"{metrics.name} has lost lines of steps up to {step}; those that follow are "
                    "appended.",
                    LowtideWarning,
                    stacklevel=2,
                )
            else:
                metrics.truncate(resumed.state.metrics_bytes)
        _end_last_line(self.directory / EVENTS_FILE)
        self.saved_step = step
        weights = self.directory / WEIGHTS_FILE
        if weights.exists() and file_checksum(weights) == resumed.files[WEIGHTS_FILE]["sha256"]:
            self.step_in_place = step
        else:
            self._pending = _Pending(step, resumed.state.history["best_step"] == step, None)

    def save(
        self,
        adapter: Adapter,
        optimizer: Mapping[str, Tensor],
        order: dict[str, int],
        history: History,
    ) -> None:
        """Write a checkpoint, which is pending until `confirm`.

        Args:
            adapter: its parameters.
            optimizer: what the optimiser keeps.
            order: position in the order of the records.
            history: what was done so far.

        Raises:
            OutputError: the disk is full; the checkpoints before are still in place.
            TrainingError: a value of the adapter is not finite, though a loss may be.
        """
        _require_finite(adapter)
        try:
            self._check_place()
            state = RunState(
                step=history.step,
                order=order,
                history=asdict(history),
                metrics_bytes=self._sync_metrics(),
                settings=asdict(self._identity.settings),
                fingerprints=self._identity.fingerprints,
                arithmetic=self._identity.arithmetic,
            )
            self._checkpoints.write(adapter, self._identity.base_model, optimizer, state)
        except OSError as error:
            raise unwritable(self.directory, error) from error
        best = history.best_step == history.step
        self._pending = _Pending(history.step, best, self.saved_step)
        self.saved_step = history.step

    def _check_place(self) -> None:
        """Notice that a disk is gone, before its mount point is written to in its stead."""
        if _place(self.directory) != self._place:
            raise FileNotFoundError(errno.ENOENT, "another directory lies there now")

    def _sync_metrics(self) -> int:
        """Flush metrics.jsonl to the disk, so that a checkpoint never has more steps than it."""
        with open(self.root / METRICS_FILE, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def confirm(self) -> None:
        """A finite loss was computed with the saved parameters.

        Raises:
            OutputError: the files cannot be put in place; the checkpoint is still there.
        """
        if self._pending is None:
            return
        step = self._pending.step
        try:
            self._check_place()
            if self._hidden is not None:
                self._move_in(self._hidden)
                self._hidden = None
            if self._pending.best:
                (self.directory / BEST_FOLDER).mkdir(exist_ok=True)
                self._publish(step, self.directory / BEST_FOLDER)
            self._publish(step, self.directory)
            self.step_in_place, self._pending = step, None
            self._checkpoints.prune(self._keep)
        except OSError as error:
            raise unwritable(self.directory, error) from error

    def _publish(self, step: int, directory: Path) -> None:
        """Second names for a checkpoint's adapter; its config first, which all of a run share."""
        source = self._checkpoints.path(step)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            link_atomically(source / name, directory / name)

    def _move_in(self, hidden: Path) -> None:
        """Replace what the directory held. The checkpoints come last: without them no run is there.

        What was there before goes into the hidden directory, which is removed in the end.
        """
        for name in (FOLDER, BEST_FOLDER, *LEFT_BY_OTHERS):
            if (self.directory / name).exists():
                os.rename(self.directory / name, hidden / f"{name}-before")
        sync_directory(self.directory)
        for path in sorted(hidden.iterdir()):
            if path.is_file() or path.name == TENSORBOARD_FOLDER:
                os.replace(path, self.directory / path.name)
        sync_directory(self.directory)
        os.rename(hidden / FOLDER, self.directory / FOLDER)
        sync_directory(self.directory)
        shutil.rmtree(hidden, ignore_errors=True)

    def keep_best(self) -> None:
        """The checkpoint that was saved last turned out to be the best: `confirm` keeps it."""
        assert self.saved_step is not None, "a resumed run has one"
        self._pending = _Pending(self.saved_step, True, None)

    def roll_back(self) -> None:
        """The pending checkpoint did not prove good: remove it, if there is one before it."""
        if self._pending is None or self._hidden is not None:
            return
        with contextlib.suppress(OSError):
            if len(self._checkpoints.steps()) > 1:
                self._checkpoints.remove(self._pending.step)
        self.saved_step, self._pending = self._pending.before, None

    def close(self) -> None:
        """Remove what was never confirmed."""
        if self._hidden is not None:
            shutil.rmtree(self._hidden, ignore_errors=True)

    def log(self, entry: Mapping[str, object], name: str = METRICS_FILE) -> None:
        """Append one line to a file of JSON lines.

        Args:
            entry: what JSON can hold.
            name: of the file.

        Raises:
            OutputError: the disk is full.
        """
        try:
            self._check_place()
            with open(self.root / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise unwritable(self.directory, error) from error


class _Pending(NamedTuple):
    """A checkpoint whose parameters' loss is not known yet."""

    step: int
    best: bool
    before: int | None
    """The step that was saved before it."""


def _place(directory: Path) -> tuple[int, int]:
    """What tells a directory from another of the same name."""
    found = os.stat(directory)
    return found.st_dev, found.st_ino


def _require_finite(adapter: Adapter) -> None:
    """An infinite value may hide behind a finite loss; nobody could use such an adapter."""
    for name, parameter in adapter.items():
        low, high = parameter.aminmax()  # NaN where any element is
        if not (math.isfinite(low) and math.isfinite(high)):
            raise TrainingError(
                f"{name} has values that are not finite. Lower --learning-rate, or clip with "
                "--max-grad-norm."
            )


def _end_last_line(path: Path) -> None:
    """End a line of which a killed run wrote only a part, so that the next one stands alone."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
