"""What a quantised storage is, one that lowtide writes, and the frozen matrix over one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from lowtide.weights.matrix import StoredMatrix

Parts = Mapping[str, Tensor]
"""The tensors that one `(out, in)` matrix is stored as; the first dimension of each is `out`."""


class Storage(Protocol):
    """How the rows of a frozen matrix are stored. Rows do not depend on one another.

    The function of a quantised model is the one with the matrices that `decode_` gives, which are
    the same in every dtype: float32 holds each weight.
    """

    @property
    def name(self) -> str:
        """As people call it."""

    def scratch_bytes(self, rows: int, span: tuple[int, int], cols: int, itemsize: int) -> int:
        """What `decode_` allocates and frees beside `out`.

        Args:
            rows: of the tile.
            span: its columns.
            cols: of the matrix.
            itemsize: bytes of an element of `out`.

        Returns:
            Bytes.
        """

    def decode_(
        self, out: Tensor, parts: Parts, rows: slice | Tensor, span: tuple[int, int]
    ) -> None:
        """`out = W[rows, start:stop]`, `(n, stop - start)` with contiguous rows."""


class Quantizer(Storage, Protocol):
    """A storage that `--quantize` can make.

    Scales are bfloat16, so that an integer times its scale is exact in float32 already.
    """

    def entries(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape by name of the parts of an `(out, in)` matrix."""

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        """The parts of some rows `(n, in)`, float32 and finite."""


class QuantizedMatrix(StoredMatrix):
    """A frozen `(out, in)` matrix in a quantised storage."""

    widens = True

    def __init__(
        self, storage: Storage, parts: Parts, shape: tuple[int, int], compute_dtype: torch.dtype
    ) -> None:
        """Wrap `parts`, on mapped memory."""
        self.storage = self._storage = storage
        self._parts = parts
        self._shape, self._dtype = shape, compute_dtype

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self._shape

    def rows(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        """`W[start:stop]` in the compute dtype, `(stop - start, in)`."""
        self._reading(start)
        out = buffer[: (stop - start) * self._shape[1]].view(stop - start, -1)
        self._storage.decode_(out, self._parts, slice(start, stop), (0, self._shape[1]))
        return out

    def cols(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        """`W[:, start:stop]` in the compute dtype, `(out, stop - start)`."""
        self._reading(0)
        out = buffer[: self._shape[0] * (stop - start)].view(-1, stop - start)
        self._storage.decode_(out, self._parts, slice(None), (start, stop))
        return out

    def whole(self) -> Tensor:
        """The whole dequantised matrix in the compute dtype, for reference code and tests."""
        rows, cols = self._shape
        return self.rows(0, rows, torch.empty(rows * cols, dtype=self._dtype))

    def stored(self, start: int, stop: int) -> list[Tensor]:
        """The mapped tensors that rows `[start, stop)` are stored as."""
        return [part[start:stop] for part in self._parts.values()]

    def take_(self, indices: Tensor, out: Tensor) -> None:
        """See `StoredMatrix.take_`."""
        self._storage.decode_(out, self._parts, indices, (0, self._shape[1]))
