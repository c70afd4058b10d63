"""The output directory of a run: refused before training where it cannot serve, saved to safely."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lowtide.config import to_yaml
from lowtide.errors import OutputError
from lowtide.export.peft import CONFIG_FILE, WEIGHTS_FILE
from lowtide.model.adapter import Adapter
from lowtide.weights.writer import write_atomically

from .settings import TrainSettings

SETTINGS_FILE, METRICS_FILE, EVENTS_FILE = "run.yaml", "metrics.jsonl", "events.jsonl"
_RUN_FILES = (WEIGHTS_FILE, CONFIG_FILE, SETTINGS_FILE, METRICS_FILE, EVENTS_FILE)
_SPARE_BYTES = 1 << 20


def check_output(directory: Path, overwrite: bool) -> None:
    """Refuse a directory that holds a run or cannot be written. Nothing is made or changed.

    Args:
        directory: where the adapter will go.
        overwrite: whether a run may be replaced.

    Raises:
        OutputError: says which.
    """
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"--adapter-path {directory} is a file; name a directory.")
    if directory.is_symlink() and not directory.exists():
        raise OutputError(
            f"--adapter-path {directory} is a link to {os.readlink(directory)}, which does not "
            "exist. Make that directory, or choose another."
        )
    held = [name for name in _RUN_FILES if (directory / name).exists()]
    if held and not overwrite:
        raise OutputError(
            f"--adapter-path {directory} already holds a run ({', '.join(held)}). Choose another "
            "directory, or replace it with --overwrite."
        )
    existing = _existing(directory)
    if not existing.is_dir():
        raise OutputError(
            f"--adapter-path {directory}: {existing} is a file, so no directory can be made in "
            "it. Choose another."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(
            f"--adapter-path {directory}: {existing} cannot be written. Choose a directory that "
            "you own."
        )


def check_space(directory: Path, adapter: Adapter) -> None:
    """Refuse when the disk cannot take the adapter beside the one it replaces.

    Args:
        directory: where the adapter will go; it need not exist yet.
        adapter: for its size.

    Raises:
        OutputError: says what is free and what is needed.
    """
    one = sum(p.numel() * p.element_size() for _, p in adapter.items())
    needed = 2 * one + _SPARE_BYTES
    disk = shutil.disk_usage(_existing(directory))
    free = disk.free
    if free < needed and disk.total > 0:  # no total: not a disk, and writing will tell
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


@contextmanager
def made_directory(directory: Path) -> Iterator[Path]:
    """Make the output directory for the length of a run, and a directory in it for token caches.

    On leaving, the caches are removed, and so are the directories that were made and stayed empty.

    Args:
        directory: made with its parents where they do not exist.

    Yields:
        The directory for the caches, which nothing else uses.

    Raises:
        OutputError: the directory cannot be made or written.
    """
    absent = [path for path in (directory, *directory.parents) if not path.exists()]
    caches = None
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            caches = tempfile.mkdtemp(prefix=".tokenized-", dir=directory)
        except OSError as error:
            raise _unwritable(directory, error) from error
        yield Path(caches)
    finally:
        if caches is not None:
            shutil.rmtree(caches, ignore_errors=True)
        with contextlib.suppress(OSError):  # the first that is not empty, or was not made
            for path in absent:
                path.rmdir()


def _unwritable(directory: Path, error: OSError) -> OutputError:
    return OutputError(
        f"--adapter-path {directory} cannot be written: {error.strerror}. Choose a directory that "
        "you own, on a disk with free space."
    )


class RunDir:
    """Writes a run's files. The last adapter that proved good survives one that did not.

    Whether saved parameters are good is known only when the next loss is finite; `confirm` says
    so. Until the first `confirm` everything lies in a hidden directory, and what the output
    directory held before is untouched. Later, the adapter before is kept beside the new one until
    that is confirmed; `roll_back` puts it back.
    """

    def __init__(self, directory: Path, settings: TrainSettings, base_model: str) -> None:
        """Write run.yaml to the hidden directory.

        Args:
            directory: where the adapter goes.
            settings: what run.yaml says.
            base_model: what adapter_config.json says.

        Raises:
            OutputError: the directory cannot be written.
        """
        self.directory = directory
        self.saved_step: int | None = None
        """The step that was last saved, hidden or in place."""
        self._base_model = base_model
        self._before: int | None = None
        self._spare = directory / f".{WEIGHTS_FILE}.before"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._hidden: Path | None = Path(tempfile.mkdtemp(prefix=".run-", dir=directory))
        except OSError as error:
            raise _unwritable(directory, error) from error
        try:
            write_atomically(self._hidden / SETTINGS_FILE, [to_yaml(settings).encode()])
        except BaseException:
            self.close()
            raise

    @property
    def step_in_place(self) -> int | None:
        """The step whose adapter lies in the output directory; None before the first `confirm`."""
        return self.saved_step if self._hidden is None else None

    def save(self, adapter: Adapter, step: int) -> None:
        """Write the adapter of `step`, keeping the one before until `confirm`.

        Args:
            adapter: what to write.
            step: how many updates made it.

        Raises:
            OutputError: the disk is full; the one before is still in place.
        """
        if self._hidden is not None:
            adapter.save(self._hidden, self._base_model)
        else:
            if self._before is None:
                self._keep()
                self._before = self.saved_step
            try:
                adapter.save(self.directory, self._base_model)
            except BaseException:  # its weights may be in place though its config is not
                self.roll_back()
                raise
        self.saved_step = step

    def _keep(self) -> None:
        """A second name for the adapter in place; a copy where a file system has no links."""
        current = self.directory / WEIGHTS_FILE
        try:
            self._spare.unlink(missing_ok=True)
            try:
                os.link(current, self._spare)
            except OSError:
                shutil.copyfile(current, self._spare)
        except OSError as error:
            self._spare.unlink(missing_ok=True)
            raise _unwritable(self.directory, error) from error

    def confirm(self) -> None:
        """A finite loss was computed with the saved parameters.

        Raises:
            OutputError: the files of the first save cannot be put in place.
        """
        if self._hidden is not None:
            try:
                (self.directory / METRICS_FILE).unlink(missing_ok=True)
                for path in sorted(self._hidden.iterdir()):
                    os.replace(path, self.directory / path.name)
                self._hidden.rmdir()
            except OSError as error:
                raise _unwritable(self.directory, error) from error
            self._hidden = None
        elif self._before is not None:
            self._before = None
            self._spare.unlink(missing_ok=True)

    def roll_back(self) -> None:
        """The save failed, or its parameters' loss is not finite: put the adapter before back."""
        if self._before is not None:
            os.replace(self._spare, self.directory / WEIGHTS_FILE)
            self.saved_step, self._before = self._before, None

    def close(self) -> None:
        """Remove what was never confirmed."""
        if self._hidden is not None:
            shutil.rmtree(self._hidden, ignore_errors=True)
        self._spare.unlink(missing_ok=True)

    def log(self, entry: Mapping[str, object], name: str = METRICS_FILE) -> None:
        """Append one line to a file of JSON lines.

        Args:
            entry: what JSON can hold.
            name: of the file.

        Raises:
            OutputError: the disk is full.
        """
        directory = self._hidden or self.directory
        try:
            with open(directory / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise _unwritable(self.directory, error) from error
