"""A frozen matrix in a mapped file, seen as tiles in the compute dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .storages.base import Storage

_TAKE_ROWS = 128


class Watch(Protocol):
    """Told what is about to be read of a matrix, so that its pages can be there and others not."""

    @property
    def max_rows(self) -> int:
        """Rows that may be read at once."""

    def reading(self, start: int) -> None:
        """Rows from `start`, at most `max_rows`, or all columns of some are about to be read."""

    def looked_up(self) -> None:
        """Single rows have been read, and are not needed again."""


class StoredMatrix(ABC):
    """A frozen `(out, in)` matrix of a checkpoint, whatever its storage.

    Implements `ops.frozen.FrozenMatrix`, and tells its watch, if it has one, what is about to be
    read.

    Attributes:
        watch: told of reads.
        storage: what tiles are unpacked from; None where numbers are stored as they are.
        widens: whether tiles are converted into the caller's buffer, not views of the file.
        reordered: whether rows lie in another order in the file, so that they are always copied.
    """

    watch: Watch | None = None
    storage: Storage | None = None
    widens: bool
    reordered = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""

    @abstractmethod
    def rows(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        """`W[start:stop]` in the compute dtype, `(stop - start, in)`."""

    @abstractmethod
    def cols(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        """`W[:, start:stop]` in the compute dtype, `(out, stop - start)`."""

    @abstractmethod
    def whole(self) -> Tensor:
        """The whole matrix in a floating dtype, for reference code and tests."""

    @abstractmethod
    def stored(self, start: int, stop: int) -> list[Tensor]:
        """The mapped tensors that rows `[start, stop)` are stored as."""

    @abstractmethod
    def take_(self, indices: Tensor, out: Tensor) -> None:
        """`out = W[indices]`, all at once, and no watch is told."""

    def rows_per_tile(self, buffer: Tensor) -> int:
        """Rows that one call of `rows` may ask for.

        No more where nothing is widened: the product library packs what it is given into memory
        of its own.
        """
        rows = max(1, buffer.numel() // self.shape[1])
        return rows if self.watch is None else min(rows, self.watch.max_rows)

    def take(self, indices: Tensor, out: Tensor) -> None:
        """`out = W[indices]`, some rows at a time."""
        self._gather(indices, out)
        if self.watch is not None:
            self.watch.looked_up()

    def _gather(self, indices: Tensor, out: Tensor) -> None:
        for start in range(0, len(indices), _TAKE_ROWS):
            some = slice(start, start + _TAKE_ROWS)
            self.take_(indices[some], out[some])

    def _reading(self, start: int) -> None:
        """Rows from `start`, or all of some columns, are about to be read."""
        if self.watch is not None:
            self.watch.reading(start)


class MappedMatrix(StoredMatrix):
    """A frozen `(out, in)` matrix whose storage is a mapped safetensors file.

    When the stored dtype is the compute dtype, tiles are views of the file and cost nothing;
    otherwise they are widened into the caller's buffer.
    """

    def __init__(self, stored: Tensor, compute_dtype: torch.dtype) -> None:
        """Wrap `stored`, a 2-D tensor on mapped memory."""
        self._stored = stored
        self.widens = stored.dtype != compute_dtype

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        rows, cols = self._stored.shape
        return rows, cols

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self._stored.numel() * self._stored.element_size()

    def rows(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        """`W[start:stop]` in the compute dtype, `(stop - start, in)`."""
        self._reading(start)
        return self._widened(self._stored[start:stop], buffer)

    def cols(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        """`W[:, start:stop]` in the compute dtype, `(out, stop - start)`."""
        self._reading(0)
        return self._widened(self._stored[:, start:stop], buffer)

    def whole(self) -> Tensor:
        """The stored tensor itself, for reference code and tests; never widened."""
        self._reading(0)
        return self._stored

    def stored(self, start: int, stop: int) -> list[Tensor]:
        """The mapped tensors that rows `[start, stop)` are stored as."""
        return [self._stored[start:stop]]

    def take_(self, indices: Tensor, out: Tensor) -> None:
        """See `StoredMatrix.take_`."""
        if out.dtype == self._stored.dtype:
            torch.index_select(self._stored, 0, indices, out=out)
        else:
            out.copy_(self._stored.index_select(0, indices))

    def _widened(self, part: Tensor, buffer: Tensor) -> Tensor:
        if not self.widens:
            return part
        rows, cols = part.shape
        return buffer.as_strided((rows, cols), (cols, 1)).copy_(part)


class ReorderedMatrix(StoredMatrix):
    """A frozen `(out, in)` matrix whose rows lie in another order in the file."""

    reordered = True

    def __init__(self, stored: StoredMatrix, order: Tensor) -> None:
        """Wrap `stored`; row i here is its row `order[i]`."""
        self._stored, self._order = stored, order
        self.storage, self.widens = stored.storage, stored.widens

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self._stored.shape

    def rows(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        """`W[start:stop]` in the compute dtype, `(stop - start, in)`."""
        self._reading(start)
        out = buffer[: (stop - start) * self.shape[1]].view(stop - start, -1)
        self._stored._gather(self._order[start:stop], out)
        return out

    def cols(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        """`W[:, start:stop]` in the compute dtype, `(out, stop - start)`; copied twice."""
        self._reading(0)
        moved = self._stored.cols(start, stop, buffer).index_select(0, self._order)
        return buffer[: moved.numel()].view(moved.shape).copy_(moved)

    def whole(self) -> Tensor:
        """The whole matrix in a floating dtype, for reference code and tests."""
        self._reading(0)
        return self._stored.whole().index_select(0, self._order)

    def stored(self, start: int, stop: int) -> list[Tensor]:
        """The mapped tensors that rows `[start, stop)` are stored as: all, since they are mixed."""
        return self._stored.stored(0, self.shape[0])

    def take_(self, indices: Tensor, out: Tensor) -> None:
        """See `StoredMatrix.take_`."""
        self._stored.take_(self._order.index_select(0, indices), out)
