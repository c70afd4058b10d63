"""Tokenised sequences in one mapped file: what training reads instead of a data set.

It is an ordinary safetensors file with three tensors, the sequences laid end to end:

    ids      int32  (N,)       a token's id where it is a label, else ~id (which is negative)
    offsets  int64  (n + 1,)   sequence i is [offsets[i], offsets[i + 1])
    digests  uint64 (n,)       of the whole record, before it was cut

N is even, so that what follows is aligned; a token that fills it up belongs to no sequence. The
header says how long the longest sequence is. Reading copies one sequence and nothing else; the
pages behind it belong to the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import DataError, OutputError

IGNORED = -100
_FORMAT = "lowtide tokens 2"
_HEADER_BYTES = 512
_FLUSH_TOKENS = 1 << 16
_TENSORS = {"ids": ("I32", "<i4"), "offsets": ("I64", "<i8"), "digests": ("U64", "<u8")}


class CacheWriter:
    """Writes a cache one sequence at a time, holding no more than a small buffer.

    The ids go straight to the file; offsets and digests grow in unnamed files beside it, and
    `commit` appends them. Without it nothing is left behind.

    Args:
        path: The file to write, in a directory that is there.

    Raises:
        OutputError: The directory cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._buffers = (array("i"), array("q", [0]), array("Q"))
        self._files: list[IO[bytes]] = []
        self._count = self._total = self._longest = 0
        self._committed = False
        try:
            self._files.append(open(path, "wb"))
            self._files[0].write(bytes(_HEADER_BYTES))
            self._files += [TemporaryFile(dir=path.parent) for _ in range(2)]
        except OSError as error:
            self.close()
            raise unwritable(path, error) from None

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
        """Give back the temporary files; without `commit`, the cache's own too."""
        for file in self._files:
            with contextlib.suppress(OSError):  # a full disk has been told of already
                file.close()
        self._files.clear()
        if not self._committed:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)

    def append(self, ids: Sequence[int], trained: Sequence[int], digest: int) -> None:
        """Add one sequence.

        Args:
            ids: Its token ids.
            trained: 1 for each token that is a label, else 0.
            digest: Of the record that it came from, 64 bits.

        Raises:
            OutputError: The disk is full.
        """
        own, offsets, digests = self._buffers
        if 0 in trained:
            ids = [token if flag else ~token for token, flag in zip(ids, trained, strict=True)]
        own.extend(ids)
        self._count += 1
        self._total += len(ids)
        self._longest = max(self._longest, len(ids))
        offsets.append(self._total)
        digests.append(digest)
        if len(own) >= _FLUSH_TOKENS or len(offsets) >= _FLUSH_TOKENS:
            self._flush()

    def commit(self) -> None:
        """Finish the file, and see that it is on the disk.

        Raises:
            OutputError: The disk is full.
        """
        if self._total % 2:
            self._buffers[0].append(0)
        self._flush()
        out, *others = self._files
        try:
            for file in others:
                file.seek(0)
                shutil.copyfileobj(file, out, 1 << 20)
            out.seek(0)
            out.write(_header(self._count, self._total, self._longest))
            out.flush()
            os.fsync(out.fileno())
        except OSError as error:
            raise unwritable(self._path, error) from None
        self._committed = True

    def _flush(self) -> None:
        try:
            for file, buffer in zip(self._files, self._buffers, strict=True):
                buffer.tofile(file)
                del buffer[:]
        except OSError as error:
            raise unwritable(self._path, error) from None


_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError),
)


class TokenDataset:
    """A cache, open for reading; make one with `TokenDataset.open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        header, start = _read_header(mapped)
        metadata, parts = header.pop("__metadata__", {}), {}
        if metadata.get("format") != _FORMAT or set(header) != set(_TENSORS):
            raise _BrokenCacheError(f"it is of another format than {_FORMAT!r}")
        for name, (dtype, kind) in _TENSORS.items():
            first, last = (start + int(place) for place in header[name]["data_offsets"])
            if header[name]["dtype"] != dtype or not start <= first <= last <= len(mapped):
                raise _BrokenCacheError(f"its {name} do not lie within its {len(mapped):,} bytes")
            parts[name] = np.asarray(mapped[first:last]).view(kind)
        self._ids, self._offsets, self.digests = parts["ids"], parts["offsets"], parts["digests"]
        self.longest = int(metadata["longest"])
        """Tokens in the longest sequence."""
        fit = len(self._offsets) == len(self.digests) + 1
        if not fit or len(self._ids) - self.n_tokens not in (0, 1):
            raise _BrokenCacheError("its tensors do not fit together")

    @classmethod
    def open(cls, path: Path | str) -> TokenDataset:
        """Map a cache.

        Args:
            path: A file written by `CacheWriter`.

        Returns:
            The data set; it reads from the file as long as it lives.

        Raises:
            DataError: The file is missing, or is not a whole cache.
        """
        path = Path(path)
        try:
            return cls(path)
        except FileNotFoundError:
            raise DataError(f"no token cache at {path}. Prepare the data again.") from None
        except _UNREADABLE as error:
            raise DataError(
                f"{path} is not a whole token cache: {error}. Delete it and prepare the data again."
            ) from None

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def n_tokens(self) -> int:
        """Tokens in all sequences together."""
        return int(self._offsets[-1])

    def lengths_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each of these sequences.

        Args:
            indices: Which, each in [0, len(self)).

        Returns:
            As many lengths.
        """
        return np.asarray(self._offsets[indices + 1] - self._offsets[indices], dtype=np.int64)

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
        if not -len(self) <= i < len(self):
            raise IndexError(f"sequence {i} of {len(self)}")
        i %= len(self)
        stored = self._ids[self._offsets[i] : self._offsets[i + 1]]
        trained = stored >= 0
        ids: list[int] = np.where(trained, stored, ~stored).tolist()
        labels: list[int] = np.where(trained, stored, IGNORED).tolist()
        return ids, labels


class _BrokenCacheError(ValueError):
    """What is wrong with a cache; becomes a DataError that names the file."""


def _header(count: int, total: int, longest: int) -> bytes:
    """The safetensors header, padded to the place that is kept for it."""
    lengths = (total + total % 2, count + 1, count)
    metadata = {"format": _FORMAT, "longest": str(longest)}
    entries: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for (name, (dtype, kind)), length in zip(_TENSORS.items(), lengths, strict=True):
        end = start + length * int(kind[-1])
        entries[name] = {"dtype": dtype, "shape": [length], "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    return struct.pack("<Q", _HEADER_BYTES - 8) + text.ljust(_HEADER_BYTES - 8)


def _read_header(mapped: NDArray[np.uint8]) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors start."""
    raw = mapped[:_HEADER_BYTES].tobytes()
    if len(raw) < _HEADER_BYTES or raw[:8] != struct.pack("<Q", _HEADER_BYTES - 8):
        raise _BrokenCacheError("it has no header")
    header = json.loads(raw[8:])
    if not isinstance(header, dict):
        raise _BrokenCacheError("its header is no JSON object")
    return header, _HEADER_BYTES


def unwritable(path: Path, error: OSError) -> OutputError:
    """The error of a cache that cannot be written.

    Args:
        path: The file or directory.
        error: What the system said.

    Returns:
        The error to raise.
    """
    return OutputError(
        f"cannot write the token cache {path}: {error.strerror or error}. Free some space, or "
        "choose another directory with --cache-dir."
    )
