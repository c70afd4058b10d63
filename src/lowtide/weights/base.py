"""A model's opened weights, whatever kind of file they lie in."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowtide.errors import ModelError, listed

from .matrix import StoredMatrix


class FileState(NamedTuple):
    """What tells one content of a file from another without reading it."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState | None:
        """The state now, or None where there is no such file."""
        try:
            found = os.stat(path)
        except OSError:
            return None
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


class Weights(ABC):
    """The tensors of a model by Hugging Face name, on mapped memory.

    Attributes:
        kind: of files, as people call it.
        is_plain: whether they are safetensors files with every tensor as it is.
        files: that are mapped.
    """

    kind: str
    is_plain: bool

    def __init__(self, files: Sequence[Path]) -> None:
        """Note what the files are now; they have just been mapped."""
        self.files = list(files)
        self._states = {path: FileState.of(path) for path in files}

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files on disk."""
        return sum(path.stat().st_size for path in self.files)

    @abstractmethod
    def __getitem__(self, name: str) -> Tensor:
        """A tensor that is no matrix, in a floating dtype."""

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name that is stored as numbers are, not unpacked."""

    @abstractmethod
    def matrix(self, name: str, shape: tuple[int, int], compute_dtype: torch.dtype) -> StoredMatrix:
        """The `(out, in)` matrix of that name, which `check` has found to be there."""

    @abstractmethod
    def stored_as(self, name: str) -> str:
        """The storage or the dtype of a tensor, by name."""

    @abstractmethod
    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor, as it is stored."""

    @abstractmethod
    def check(self, expected: Mapping[str, tuple[int, ...]], optional: Iterable[str] = ()) -> None:
        """Compare names, shapes and dtypes with what the model needs, all problems at once.

        Args:
            expected: shape by tensor name.
            optional: names that may be there and are not used.

        Raises:
            ModelError: lists every missing, extra, wrongly shaped or wrongly stored tensor.
        """

    def bytes_by_storage(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of the tensors of these names, by storage or dtype."""
        found: dict[str, int] = {}
        for name in names:
            kind = self.stored_as(name)
            found[kind] = found.get(kind, 0) + self.stored_bytes(name)
        return found

    def check_unchanged(self) -> None:
        """See that the weight files are those that were opened: one stat(2) per file.

        A file that is replaced by renaming leaves the mapped one as it was: what was computed so
        far is right, but the path now means other weights. A file that is written in place changes
        under the reader, and one that is cut short ends the process with SIGBUS if a missing page
        is read before this is called.

        Raises:
            ModelError: lists every file that is gone, another one, or was written to.
        """
        problems = []
        for path, opened in self._states.items():
            now = FileState.of(path)
            if now == opened:
                continue
            if now is None or opened is None:
                problems.append(f"{path} is gone")
            elif now[:2] != opened[:2]:
                problems.append(f"{path} was replaced by another file")
            else:
                sizes = f" ({opened.size:,} bytes before, {now.size:,} now)"
                problems.append(
                    f"{path} was written to{sizes if now.size != opened.size else ' in place'}"
                )
        if problems:
            raise ModelError(
                f"the model's weights changed while they were in use:\n{listed(problems)}\nAn "
                "adapter fits the weights that it was trained on. Put them back, or start again "
                "with those that are there now; keep a model's files as they are while it is used."
            )
