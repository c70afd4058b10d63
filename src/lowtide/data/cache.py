"""Tokenised sequences in one mapped file: what training reads instead of a data set.

A cache is an ordinary safetensors file with three tensors, the sequences laid end to end:

    offsets  int64  (n + 1,)   sequence i is [offsets[i], offsets[i + 1])
    ids      int32  (N,)       token ids
    trained  uint8  (N,)       1 where the token is a label

Reading a sequence copies that sequence and nothing else; the pages behind it belong to the file.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from array import array
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, Any

from safetensors import SafetensorError, safe_open

from lowtide.errors import DataError, OutputError

IGNORED = -100
_FLUSH_TOKENS = 1 << 16


class CacheWriter:
    """Writes a cache one sequence at a time, holding no more than a small buffer.

    The tensors grow in unnamed temporary files beside the cache; `commit` joins them under a
    temporary name and renames it, so that a cache is either whole or not there.

    Args:
        path: The file to write.

    Raises:
        OutputError: The directory cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets = array("q", [0])
        self._ids = array("i")
        self._trained = array("B")
        self._files: list[IO[bytes]] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(3):
                self._files.append(TemporaryFile(dir=path.parent))
        except OSError as error:
            self.close()
            raise _unwritable(path, error) from None
        self._count = 0
        self._total = 0

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back the temporary files; without `commit` nothing is left behind."""
        for file in self._files:
            file.close()
        self._files.clear()

    def append(self, ids: Sequence[int], trained: Sequence[int]) -> None:
        """Add one sequence.

        Args:
            ids: Its token ids.
            trained: 1 for each token that is a label, else 0.

        Raises:
            OutputError: The disk is full.
        """
        assert len(ids) == len(trained), "one flag for each id"
        self._ids.extend(ids)
        self._trained.extend(trained)
        self._count += 1
        self._total += len(ids)
        self._offsets.append(self._total)
        if len(self._ids) >= _FLUSH_TOKENS or len(self._offsets) >= _FLUSH_TOKENS:
            self._flush()

    def commit(self) -> None:
        """Put the cache in place, replacing an older one in a single step.

        Raises:
            OutputError: The disk is full, or the file cannot be replaced.
        """
        self._flush()
        temporary = temporary_path(self._path)
        try:
            with open(temporary, "wb") as out:
                out.write(_header(self._count, self._total))
                for file in self._files:
                    file.seek(0)
                    shutil.copyfileobj(file, out, 1 << 20)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, self._path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _unwritable(self._path, error) from None

    def _flush(self) -> None:
        try:
            for file, buffer in zip(
                self._files, (self._offsets, self._ids, self._trained), strict=True
            ):
                buffer.tofile(file)
                del buffer[:]
        except OSError as error:
            raise _unwritable(self._path, error) from None


def write_cache(path: Path, sequences: Iterable[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Write sequences of (ids, trained flags) to a cache, in bounded memory.

    Args:
        path: The file to write; replaced whole or left as it was.
        sequences: Each a pair of equally long lists.

    Raises:
        OutputError: The directory cannot be written, or the disk is full.
    """
    with CacheWriter(path) as writer:
        for ids, trained in sequences:
            writer.append(ids, trained)
        writer.commit()


class TokenDataset:
    """A cache, open for reading; make one with `TokenDataset.open`."""

    def __init__(self, path: Path, mapped: Any) -> None:
        self.path = path
        self._ids = mapped.get_slice("ids")
        self._trained = mapped.get_slice("trained")
        self._offsets = mapped.get_slice("offsets")
        self._count = int(self._offsets.get_shape()[0]) - 1

    @classmethod
    def open(cls, path: Path | str) -> TokenDataset:
        """Map a cache.

        Args:
            path: A file written by `write_cache`.

        Returns:
            The data set; it reads from the file as long as it lives.

        Raises:
            DataError: The file is missing, or is not a whole cache.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"no token cache at {path}. Prepare the data again.")
        try:
            mapped = safe_open(str(path), framework="numpy")
            dataset = cls(path, mapped)
            dataset._check()
        except (SafetensorError, OSError, _BrokenCacheError) as error:
            raise DataError(
                f"{path} is not a whole token cache: {error}. Delete it and prepare the data again."
            ) from None
        return dataset

    def _check(self) -> None:
        expected = (("offsets", self._offsets, "I64"), ("ids", self._ids, "I32"))
        for name, tensor, dtype in (*expected, ("trained", self._trained, "U8")):
            if tensor.get_dtype() != dtype or len(tensor.get_shape()) != 1:
                raise _BrokenCacheError(f"{name} is {tensor.get_dtype()} {tensor.get_shape()}")
        if self._count < 0 or self._ids.get_shape() != self._trained.get_shape():
            raise _BrokenCacheError("its tensors do not fit together")
        if int(self._offsets[self._count : self._count + 1][0]) != self.n_tokens:
            raise _BrokenCacheError("its offsets do not end where its tokens end")

    def __len__(self) -> int:
        return self._count

    @property
    def n_tokens(self) -> int:
        """Tokens in all sequences together."""
        return int(self._ids.get_shape()[0])

    @cached_property
    def lengths(self) -> Sequence[int]:
        """The length of each sequence: four bytes a sequence, read once."""
        lengths = array("i")
        start = 0
        for first in range(1, self._count + 1, _FLUSH_TOKENS):
            for end in self._offsets[first : min(first + _FLUSH_TOKENS, self._count + 1)]:
                lengths.append(int(end) - start)
                start = int(end)
        return lengths

    def sequence(self, i: int) -> tuple[list[int], list[int]]:
        """One sequence and its labels.

        Args:
            i: Its index; negative indices count from the end.

        Returns:
            The ids, and the labels as Hugging Face has them: the id itself, or -100 where the
            token is not trained on.

        Raises:
            IndexError: There is no such sequence.
        """
        if not -self._count <= i < self._count:
            raise IndexError(f"sequence {i} of {self._count}")
        i %= self._count
        start, end = (int(offset) for offset in self._offsets[i : i + 2])
        ids: list[int] = self._ids[start:end].tolist()
        trained: list[int] = self._trained[start:end].tolist()
        labels = [token if flag else IGNORED for token, flag in zip(ids, trained, strict=True)]
        return ids, labels


class _BrokenCacheError(Exception):
    """What is wrong with a cache; becomes a DataError that names the file."""


def temporary_path(path: Path) -> Path:
    """Where a cache is put together before it takes its name."""
    return path.with_name(path.name + ".tmp")


def _header(count: int, total: int) -> bytes:
    """The safetensors header: its length, then JSON, padded so that the tensors are aligned."""
    layout = (
        ("offsets", "I64", count + 1, 8),
        ("ids", "I32", total, 4),
        ("trained", "U8", total, 1),
    )
    entries: dict[str, Any] = {}
    start = 0
    for name, dtype, length, width in layout:
        end = start + length * width
        entries[name] = {"dtype": dtype, "shape": [length], "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write the token cache {path}: {error.strerror or error}. Free some space, or "
        "choose another directory."
    )
