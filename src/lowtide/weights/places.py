"""Where tensors lie in a safetensors file, and reading them without mapping it.

A mapped file counts as the process's memory as far as it was read; a file that is read once from
front to back is better read into a small buffer.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
}
_CHUNK = 1 << 20


class Place(NamedTuple):
    """A tensor's dtype, shape and first byte in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, descriptor: int, start: int, stop: int) -> Tensor:
        """Entries `start:stop` of the first dimension, read from the file into new memory.

        Args:
            descriptor: of the open file.
            start: first entry.
            stop: end.

        Returns:
            `(stop - start, ...)`.

        Raises:
            OSError: the file ends too early.
        """
        row = self.nbytes // self.shape[0]
        held = _read(descriptor, (stop - start) * row, self.start + start * row)
        return torch.frombuffer(held, dtype=self.dtype).view(stop - start, *self.shape[1:])

    def sha256(self, descriptor: int) -> str:
        """Checksum of the tensor's bytes."""
        digest = hashlib.sha256()
        for start in range(0, self.nbytes, _CHUNK):
            digest.update(_read(descriptor, min(_CHUNK, self.nbytes - start), self.start + start))
        return digest.hexdigest()


def _read(descriptor: int, count: int, offset: int) -> bytearray:
    held = bytearray(count)
    done = 0
    while done < count:
        got = os.preadv(descriptor, [memoryview(held)[done:]], offset + done)
        if got == 0:
            raise OSError(5, "the file ends before a tensor does")
        done += got
    return held


def read_header(path: Path) -> bytes:
    """The first bytes of a safetensors file, up to the first tensor; `Checkpoint` validates them.

    Args:
        path: the file.

    Returns:
        The header's length and its JSON; less where the file is shorter.
    """
    with open(path, "rb") as file:
        first = file.read(8)
        size = min(int.from_bytes(first, "little"), path.stat().st_size)
        return first + file.read(size)


def read_places(path: Path) -> dict[str, Place]:
    """Places by tensor name in the order of the file, which `Checkpoint` has found to be good.

    Args:
        path: a safetensors file.

    Returns:
        Places of the tensors that lowtide reads; those of other dtypes are left out.
    """
    header = read_header(path)
    entries = json.loads(header[8:])
    entries.pop("__metadata__", None)
    places = {
        name: Place(_DTYPES[one["dtype"]], (*one["shape"],), len(header) + one["data_offsets"][0])
        for name, one in entries.items()
        if one["dtype"] in _DTYPES
    }
    return dict(sorted(places.items(), key=lambda item: item[1].start))
