"""Products with a frozen matrix that is only ever seen one tile at a time.

A frozen weight `W (out, in)` may lie in a mapped 16-bit file. It is never widened whole: `rows` and
`cols` hand out a tile in the compute dtype, either a view of the file (when it already has that
dtype) or a copy in the flat `buffer` that the caller owns and reuses.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .products import add_product_, product_


class FrozenMatrix(Protocol):
    """A frozen `(out, in)` matrix, as the ops see it."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""

    def rows(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        """`W[start:stop]`, `(stop - start, in)`, in the compute dtype."""

    def cols(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        """`W[:, start:stop]`, `(out, stop - start)`, in the compute dtype."""

    def take(self, indices: Tensor, out: Tensor) -> None:
        """`out = W[indices]`, `(len(indices), in)`: an embedding lookup."""

    def rows_per_tile(self, buffer: Tensor) -> int:
        """How many rows one call of `rows` may ask for with this buffer."""


_ALIGN = 16


def spans(total: int, step: int) -> list[tuple[int, int]]:
    """`[0, total)` cut into spans of `step`, rounded down to a multiple of 16, and what is left.

    Products run fastest at such sizes, which are whole vector registers, and few sizes are few
    kernels (see `products`).
    """
    step = max(1, min(step, total))
    if _ALIGN < step < total:
        step -= step % _ALIGN
    return [(start, min(start + step, total)) for start in range(0, total, step)]


def matmul_(out: Tensor, x: Tensor, weight: FrozenMatrix, tile: Tensor, beta: float = 0.0) -> None:
    """`out = beta * out + x W^T`, one row tile of `W` at a time.

    Args:
        out: `(T, out)`, overwritten (`beta = 0`) or added to (`beta = 1`).
        x: `(T, in)`.
        weight: `W (out, in)`.
        tile: flat buffer in the compute dtype for the widened tile.
        beta: 0 or 1.
    """
    for start, stop in spans(weight.shape[0], weight.rows_per_tile(tile)):
        columns, w_t = out[:, start:stop], weight.rows(start, stop, tile).t()
        if beta:
            add_product_(columns, x, w_t)
        else:
            product_(columns, x, w_t)


def matmul_t_(dx: Tensor, dy: Tensor, weight: FrozenMatrix, tile: Tensor) -> None:
    """`dx += dy W`: the input gradient of `matmul_`.

    Args:
        dx: `(T, in)`, added to.
        dy: `(T, out)`.
        weight: `W (out, in)`.
        tile: flat buffer in the compute dtype for the widened tile.
    """
    for start, stop in spans(weight.shape[0], weight.rows_per_tile(tile)):
        add_product_(dx, dy[:, start:stop], weight.rows(start, stop, tile))
