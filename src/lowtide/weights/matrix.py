"""A frozen matrix in a mapped file, seen as tiles in the compute dtype."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lowtide.ops.frozen import FrozenMatrix

from .watch import Watch

_TAKE_ROWS = 128


class StoredMatrix(FrozenMatrix, Protocol):
    """A frozen matrix of a checkpoint, whatever its storage."""

    def whole(self) -> Tensor:
        """The whole `(out, in)` matrix in a floating dtype, for reference code and tests."""

    def stored(self, start: int, stop: int) -> list[Tensor]:
        """The mapped tensors that rows `[start, stop)` are stored as."""

    @property
    def watch(self) -> Watch | None:
        """Told what is about to be read, or None."""

    @watch.setter
    def watch(self, watch: Watch | None) -> None: ...


class MappedMatrix:
    """A frozen `(out, in)` matrix whose storage is a mapped safetensors file.

    Implements `StoredMatrix`. When the stored dtype is the compute dtype, tiles are
    views of the file and cost nothing; otherwise they are widened into the caller's buffer.
    """

    def __init__(self, stored: Tensor, compute_dtype: torch.dtype) -> None:
        """Wrap `stored`, a 2-D tensor on mapped memory."""
        self._stored = stored
        self._direct = stored.dtype == compute_dtype
        self.watch: Watch | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        rows, cols = self._stored.shape
        return rows, cols

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self._stored.numel() * self._stored.element_size()

    def rows_per_tile(self, buffer: Tensor) -> int:
        """Rows that one call of `rows` may ask for.

        No more where nothing is widened: the product library packs what it is given into memory
        of its own.
        """
        rows = max(1, buffer.numel() // self._stored.shape[1])
        return rows if self.watch is None else min(rows, self.watch.max_rows)

    def rows(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        """`W[start:stop]` in the compute dtype, `(stop - start, in)`."""
        self._reading(start)
        return self._widened(self._stored[start:stop], buffer)

    def cols(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        """`W[:, start:stop]` in the compute dtype, `(out, stop - start)`."""
        self._reading(0)
        return self._widened(self._stored[:, start:stop], buffer)

    def take(self, indices: Tensor, out: Tensor) -> None:
        """`out = W[indices]`, some rows at a time."""
        for start in range(0, len(indices), _TAKE_ROWS):
            stop = min(start + _TAKE_ROWS, len(indices))
            out[start:stop].copy_(self._stored[indices[start:stop]])
        if self.watch is not None:
            self.watch.looked_up()

    def whole(self) -> Tensor:
        """The stored tensor itself, for reference code and tests; never widened."""
        self._reading(0)
        return self._stored

    def stored(self, start: int, stop: int) -> list[Tensor]:
        """The mapped tensors that rows `[start, stop)` are stored as."""
        return [self._stored[start:stop]]

    def _reading(self, start: int) -> None:
        if self.watch is not None:
            self.watch.reading(start)

    def _widened(self, part: Tensor, buffer: Tensor) -> Tensor:
        if self._direct:
            return part
        return buffer[: part.numel()].view(part.shape).copy_(part)
