"""DoRA (arXiv 2402.09353): each row of the adapted weight has a learnt length of its own.

    V = W + s B A      n_j = ||V_j||      c = m / n      W' = diag(c) V

As in PEFT n is a constant of the gradient, so that with g = c * dy

    dm_j = (1 / n_j) sum_t dy_tj (x V^T)_tj

and the other gradients are LoRA's with g in the place of dy.

n is formed from V itself, some rows at a time in a buffer that a core's cache holds: `2 r in out`
FLOPs and one read of W, as many as from `||W_j||^2 + 2 s B_j (W A^T)_j + s^2 B_j A A^T B_j^T`. With
kappa_j = (||W_j|| + s sum_k |B_jk| ||A_k||) / ||V_j||, the relative error of n_j is at most
`eps ((r + 2) kappa_j + in)`; that of the expansion, whose terms cancel, grows with kappa_j squared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dropout import row_spans
from .frozen import FrozenMatrix

_CHUNK_ELEMENTS = 96 * 1024
"""Of W + s B A at a time: a core's cache holds them, and the rows of W that they are made of."""


class Magnitude(NamedTuple):
    """The learnt lengths `m (out,)` of a linear's rows, and `norm`, n `(out,)`, of this step."""

    m: Tensor
    norm: Tensor

    @property
    def factor(self) -> Tensor:
        """`c = m / n`, `(out,)`."""
        return self.m / self.norm


def row_norms_(
    out: Tensor, weight: FrozenMatrix, a: Tensor, b: Tensor, scale: float, scratch: Tensor
) -> None:
    """`out = ||W + s B A||`, of each row.

    Args:
        out: `(out,)`, overwritten.
        weight: `W (out, in)`.
        a: `(r, in)`.
        b: `(out, r)`.
        scale: s.
        scratch: flat, in the compute dtype, at least two rows of W; overwritten.
    """
    rows, columns = weight.shape
    widened, summed = (half[: max(_CHUNK_ELEMENTS, columns)] for half in scratch.chunk(2))
    step = min(widened.numel() // columns, weight.rows_per_tile(widened))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = summed[: (stop - start) * columns].view(stop - start, columns)
        torch.addmm(weight.rows(start, stop, widened), b[start:stop], a, alpha=scale, out=part)
        torch.linalg.vector_norm(part, dim=1, out=out[start:stop])


def row_norms(weight: FrozenMatrix, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`||W + s B A||` of each row, `(out,)`; see `row_norms_`."""
    norms = a.new_empty(weight.shape[0])
    row_norms_(norms, weight, a, b, scale, own_scratch(a.shape[1], a))
    return norms


def own_scratch(columns: int, like: Tensor) -> Tensor:
    """Scratch for `row_norms_` of up to so many columns, where there is none to share."""
    return like.new_empty(2 * max(_CHUNK_ELEMENTS, columns))


def column_dots(x: Tensor, y: Tensor) -> Tensor:
    """`sum_t x_tj y_tj` of `(T, n)` each: `(n,)`; the products exist a few rows at a time."""
    total = x.new_zeros(x.shape[1])
    for start, stop in row_spans(*x.shape):
        total += (x[start:stop] * y[start:stop]).sum(0)
    return total
