"""The output directory of a run: refused before training where it cannot serve, saved to safely."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from lowtide.config import to_yaml
from lowtide.errors import OutputError
from lowtide.export.peft import CONFIG_FILE, WEIGHTS_FILE
from lowtide.model.adapter import Adapter
from lowtide.weights.writer import write_atomically

from .settings import TrainSettings

SETTINGS_FILE, METRICS_FILE = "run.yaml", "metrics.jsonl"
_RUN_FILES = (WEIGHTS_FILE, CONFIG_FILE, SETTINGS_FILE, METRICS_FILE)
_SPARE_BYTES = 1 << 20


def check_output(directory: Path, overwrite: bool) -> None:
    """Refuse a directory that holds a run or cannot be written. Nothing is made or changed.

    Raises:
        OutputError: says which.
    """
    if not str(directory).strip() or str(directory) == ".":
        raise OutputError("--adapter-path is empty; name a directory for the adapter.")
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"--adapter-path {directory} is a file; name a directory.")
    held = [name for name in _RUN_FILES if (directory / name).exists()]
    if held and not overwrite:
        raise OutputError(
            f"--adapter-path {directory} already holds a run ({', '.join(held)}). Choose another "
            "directory, or replace it with --overwrite."
        )
    existing = _existing(directory)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(
            f"--adapter-path {directory}: {existing} cannot be written. Choose a directory that "
            "you own."
        )


def check_space(directory: Path, adapter: Adapter) -> None:
    """Refuse when the disk cannot take the adapter beside the one it replaces.

    Raises:
        OutputError: says what is free and what is needed.
    """
    one = sum(p.numel() * p.element_size() for _, p in adapter.items())
    needed = 2 * one + _SPARE_BYTES
    free = shutil.disk_usage(_existing(directory)).free
    if free < needed:
        raise OutputError(
            f"the disk of {directory} has {free / 1e6:.1f} MB free, and saving the adapter safely "
            f"needs {needed / 1e6:.1f} MB (two copies of {one / 1e6:.1f} MB). Free some space or "
            "choose another --adapter-path."
        )


def _existing(directory: Path) -> Path:
    """The directory itself or its nearest parent that exists."""
    path = directory.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


class RunDir:
    """Writes a run's files. The last adapter that proved good survives one that did not.

    Whether saved parameters are good is known only when the next loss is finite. Until `confirm`,
    the adapter before is kept beside the new one; `roll_back` puts it back.
    """

    def __init__(self, directory: Path, settings: TrainSettings, base_model: str) -> None:
        """Make the directory and write run.yaml.

        Raises:
            OutputError: the directory cannot be written.
        """
        self.directory = directory
        self.saved_step: int | None = None
        self._base_model = base_model
        self._before: int | None = None
        self._spare = directory / f".{WEIGHTS_FILE}.before"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / METRICS_FILE).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"--adapter-path {directory} cannot be written: {error.strerror}."
            ) from error
        write_atomically(directory / SETTINGS_FILE, [to_yaml(settings).encode()])

    def save(self, adapter: Adapter, step: int) -> None:
        """Write the adapter of `step`, keeping the one before until `confirm`.

        Raises:
            OutputError: the disk is full; the one before is still in place.
        """
        current = self.directory / WEIGHTS_FILE
        if self.saved_step is not None and current.exists():
            self._spare.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a file system without hard links: no spare
                os.link(current, self._spare)
                self._before = self.saved_step
        adapter.save(self.directory, self._base_model)
        self.saved_step = step

    def confirm(self) -> None:
        """A finite loss was computed with the saved parameters."""
        if self._before is not None:
            self._before = None
            self._spare.unlink(missing_ok=True)

    def roll_back(self) -> None:
        """The loss of the saved parameters is not finite: put the adapter before back."""
        if self._before is not None:
            os.replace(self._spare, self.directory / WEIGHTS_FILE)
            self.saved_step, self._before = self._before, None

    def log(self, entry: Mapping[str, object]) -> None:
        """Append one line to metrics.jsonl.

        Raises:
            OutputError: the disk is full.
        """
        try:
            with open(self.directory / METRICS_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise OutputError(
                f"{self.directory / METRICS_FILE} cannot be written: {error.strerror}."
            ) from error
