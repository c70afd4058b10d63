"""Checkpoints of a run: all that it needs to go on, in directories that are whole or not there.

    checkpoints/step-200/adapter_model.safetensors, adapter_config.json   a PEFT adapter
                         optimizer.safetensors                            what the optimiser keeps
                         state.json                                       the rest, and checksums

A checkpoint is written under a hidden name, file by file flushed to the disk, then its directory,
then renamed, then the directory around it is flushed. So one that is visible is complete whatever
moment the process or the machine stopped at, and what the disk itself does to it the checksums
tell. Tensors are written from where they lie; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from lowtide.errors import OutputError
from lowtide.export.peft import CONFIG_FILE, WEIGHTS_FILE, config_text
from lowtide.model.adapter import Adapter
from lowtide.weights.writer import Digest, safetensors_parts, sync_directory, write_synced

from .fingerprint import version

FOLDER = "checkpoints"
OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "state.json"
_FILES = (WEIGHTS_FILE, CONFIG_FILE, OPTIMIZER_FILE)
FORMAT = 1
_NAME = re.compile(r"step-(\d+)")
_OURS = re.compile(r"\.?step-\d+(\.(tmp|gone|damaged))?")


@dataclass(frozen=True)
class RunState:
    """What a checkpoint holds beside tensors.

    Attributes:
        step: updates made.
        order: position in the order of the records.
        history: sums and best values so far, as `loop.History` keeps them.
        metrics_bytes: how long metrics.jsonl was.
        settings: of the run.
        fingerprints: of model and data.
        arithmetic: what rounding depends on beside the settings.
    """

    step: int
    order: dict[str, int]
    history: dict[str, Any]
    metrics_bytes: int
    settings: dict[str, Any]
    fingerprints: dict[str, str | None]
    arithmetic: dict[str, str]


class DamagedError(Exception):
    """A checkpoint is not as it was written; the text says how."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found."""

    directory: Path
    state: RunState
    files: Mapping[str, Mapping[str, Any]]
    """Size and SHA-256 by name."""
    lowtide: str
    """The version that wrote it."""

    @classmethod
    def read(cls, directory: Path) -> Checkpoint:
        """Read a checkpoint and compare every file with its checksum.

        Args:
            directory: `checkpoints/step-N`.

        Returns:
            The checkpoint, whole.

        Raises:
            DamagedError: it is not as it was written.
            OutputError: it was written by a newer lowtide, or cannot be read.
        """
        try:
            found = _read_state(directory / STATE_FILE)
            for name, expected in found.files.items():
                _check_file(directory / name, expected)
        except PermissionError as error:  # which says nothing of what was written
            raise OutputError(
                f"{error.filename} cannot be read: {error.strerror}. Resume as the user who made "
                "the run."
            ) from error
        except FileNotFoundError as error:
            raise DamagedError(f"{Path(error.filename).name} is missing") from error
        except OSError as error:
            raise DamagedError(f"it cannot be read ({error.strerror})") from error
        return found

    def load(self, tensors: Mapping[str, Tensor], name: str) -> None:
        """Fill tensors from one of the files, straight into their memory.

        Args:
            tensors: by name, in the order in which they were written; contiguous.
            name: of the file.

        Raises:
            OutputError: the file holds other tensors.
        """
        path = self.directory / name
        header, *contents = safetensors_parts(tensors)
        with open(path, "rb") as file:
            if file.read(len(header)) != header:
                raise OutputError(
                    f"{path} holds other tensors than this run has. Start a new run in another "
                    "--adapter-path."
                )
            for content in contents:
                file.readinto(content)


def _read_state(path: Path) -> Checkpoint:
    try:
        document = json.loads(path.read_bytes())
        claimed = document.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path.name} is not whole") from error
    if claimed != _checksum(document):
        raise DamagedError(f"{path.name} does not have its checksum")
    if not isinstance(document.get("format"), int):
        raise DamagedError(f"{path.name} says something else than a run's state")
    if document["format"] > FORMAT:
        raise OutputError(
            f"{path.parent} was written by lowtide {document['lowtide']}, in format "
            f"{document['format']}; this is lowtide {version()}, which knows formats up to "
            f"{FORMAT}. Resume with lowtide {document['lowtide']} or newer."
        )
    try:
        state = RunState(**document["state"])
        found = Checkpoint(path.parent, state, document["files"], document["lowtide"])
        _require_types(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path.name} says something else than a run's state") from error
    return found


def _require_types(found: Checkpoint) -> None:
    """Raise TypeError or another where a value is not what is written there."""
    kinds = {"int": int, "dict": dict}
    for one in fields(RunState):
        if type(getattr(found.state, one.name)) is not kinds[str(one.type).partition("[")[0]]:
            raise TypeError(one.name)
    files = {name: (type(one["bytes"]), type(one["sha256"])) for name, one in found.files.items()}
    if any(kinds_of != (int, str) for kinds_of in files.values()) or set(files) != set(_FILES):
        raise TypeError("files")


def _checksum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise DamagedError(f"{path.name} has {size:,} bytes instead of {expected['bytes']:,}")
    if file_checksum(path) != expected["sha256"]:
        raise DamagedError(f"{path.name} does not have its checksum")


def file_checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Checkpoints:
    """All checkpoints of a run directory."""

    def __init__(self, root: Path) -> None:
        """Nothing is made or read.

        Args:
            root: of the run; they lie in its `checkpoints`.
        """
        self.folder = root / FOLDER

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"step-{step}"

    def steps(self) -> list[int]:
        """Of the checkpoints that are there, the newest first."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        found = [int(match[1]) for name in names if (match := _NAME.fullmatch(name))]
        return sorted(found, reverse=True)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is as it was written.

        Returns:
            The checkpoint, None where there is none, and what is wrong with each newer one.

        Raises:
            OutputError: the newest was written by a newer lowtide, or one cannot be read.
        """
        damaged: list[str] = []
        for step in self.steps():
            try:
                return Checkpoint.read(self.path(step)), damaged
            except DamagedError as error:
                damaged.append(f"{self.path(step).name}: {error}")
        return None, damaged

    def write(
        self, adapter: Adapter, base_model: str, optimizer: Mapping[str, Tensor], state: RunState
    ) -> None:
        """Write a checkpoint.

        Args:
            adapter: its parameters.
            base_model: what adapter_config.json says.
            optimizer: what the optimiser keeps.
            state: the rest.

        Raises:
            OSError: the disk is full, or gone; nothing is left of the checkpoint.
        """
        temporary = self.folder / f".step-{state.step}.tmp"
        contents: dict[str, Iterable[bytes | memoryview]] = {
            WEIGHTS_FILE: safetensors_parts(adapter.parameters),
            CONFIG_FILE: [config_text(adapter, base_model)],
            OPTIMIZER_FILE: safetensors_parts(optimizer),
        }
        try:
            self.folder.mkdir(exist_ok=True)
            sync_directory(self.folder.parent)
            temporary.mkdir()
            files = {}
            for name, parts in contents.items():
                digest = Digest()
                write_synced(temporary / name, digest.of(parts))
                files[name] = {"bytes": digest.bytes, "sha256": digest.sha256}
            document = {
                "format": FORMAT,
                "lowtide": version(),
                "state": asdict(state),
                "files": files,
            }
            document["sha256"] = _checksum(document)
            write_synced(temporary / STATE_FILE, [json.dumps(document, indent=1).encode()])
            sync_directory(temporary)
            os.rename(temporary, self.path(state.step))
            sync_directory(self.folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def set_aside(self, after: int) -> None:
        """Rename checkpoints newer than a step, which are damaged; `prune` removes them later."""
        for step in self.steps():
            if step > after:
                path = self.path(step)
                aside = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(path, aside)

    def remove(self, step: int) -> None:
        """Remove a checkpoint; from the first moment on, nobody finds a part of it."""
        path = self.path(step)
        gone = self.folder / f".{path.name}.gone"
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def prune(self, keep: int) -> None:
        """Remove all but the newest ones, and what else was set aside or left by a run that died.

        Args:
            keep: how many stay.
        """
        for step in self.steps()[keep:]:
            self.remove(step)
        self.sweep()
        for path in self.folder.glob("*.damaged"):
            if _OURS.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a run that died left half written or half removed."""
        for path in self.folder.glob(".step-*"):
            if _OURS.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
