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


class Magnitude(NamedTuple):
    """The learnt lengths `m (out,)` of a linear's rows, and `norm`, n `(out,)`, of this step."""

    m: Tensor
    norm: Tensor

    @property
    def factor(self) -> Tensor:
        """`c = m / n`, `(out,)`."""
        return self.m / self.norm


def chunk_elements(columns: int) -> int:
    """Elements of each of the two buffers of `row_norms`, for a matrix of so many columns."""
    return max(_CHUNK_ELEMENTS, columns)


def row_norms(weight: FrozenMatrix, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`||W + s B A||` of each row.

    Args:
        weight: `W (out, in)`.
        a: `(r, in)`.
        b: `(out, r)`.
        scale: s.

    Returns:
        `(out,)`; beside it, two buffers of `chunk_elements(in)` exist meanwhile.
    """
    rows, columns = weight.shape
    widened, summed = a.new_empty(2, chunk_elements(columns)).unbind()
    norms = a.new_empty(rows)
    step = min(max(1, widened.numel() // columns), weight.rows_per_tile(widened))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = summed[: (stop - start) * columns].view(stop - start, columns)
        torch.addmm(weight.rows(start, stop, widened), b[start:stop], a, alpha=scale, out=part)
        torch.linalg.vector_norm(part, dim=1, out=norms[start:stop])
    return norms


def column_dots(x: Tensor, y: Tensor) -> Tensor:
    """`sum_t x_tj y_tj` of `(T, n)` each: `(n,)`; the products exist a few rows at a time."""
    total = x.new_zeros(x.shape[1])
    for start, stop in row_spans(*x.shape):
        total += (x[start:stop] * y[start:stop]).sum(0)
    return total
