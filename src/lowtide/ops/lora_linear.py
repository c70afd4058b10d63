"""LoRA around a frozen linear (arXiv 2106.09685, MeSP arXiv 2602.13069): h is never stored.

    y  = x W^T + b + s h B^T,   h = D(x) A^T            W (out, in), A (r, in), B (out, r)
    dB = s dy^T h      dh = s dy B      dA = dh^T D(x)      dx += dy W + D'(dh A)

`D` is LoRA dropout (identity without it) and `D'` multiplies by the same mask. `h (T, r)` costs
2 T in r FLOPs to recompute against 2 T in out for the product beside it, so it is formed again in
the backward, used and freed; a `Lora` with `h` keeps it instead, the paper's ablation.

With a magnitude (DoRA, `dora.py`), c = m / n being a factor of each row and held constant by the
gradient but for m, and u the output of W + s B A on the adapter's input,

    y  = x W^T + b + s h B^T + (c - 1) u        u = D(x) W^T + s h B^T
    dm = sum_t dy u / n      g = c dy           dB, dh: with g instead of dy
    dx += dy W + D'((g - dy) W + dh A)

Without dropout that is y = c u + b and dx += g W + dh A, of one product with W each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .dora import Magnitude, column_dots
from .dropout import dropout_scale, row_spans
from .frozen import FrozenMatrix, matmul_, matmul_t_, spans
from .products import add_product_, product_

DORA_ROWS = 256
"""Rows of W that the backward of a linear with a magnitude takes at a time: it needs their u."""


class Lora(NamedTuple):
    """One adapted linear: `A (r, in)`, `B (out, r)`, the scale and this step's dropout.

    With `h`, an `(r, T)` tensor, h is kept instead of recomputed: written while `h_ready` is False,
    read once it is True.
    """

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0
    seed: int = 0
    h: Tensor | None = None
    h_ready: bool = False
    magnitude: Magnitude | None = None


class Linear(NamedTuple):
    """A frozen linear with its optional bias `(out,)` and its optional adapter."""

    weight: FrozenMatrix
    bias: Tensor | None
    lora: Lora | None

    @property
    def magnitude(self) -> Magnitude | None:
        """What DoRA adds, where it does; the output is then formed apart from a residual."""
        return None if self.lora is None else self.lora.magnitude


Emit = Callable[..., None]
"""Called with a linear's (dA, dB), and dm under DoRA, once none of A, B, m is needed any more."""


def dropped(x: Tensor, lora: Lora, first_col: int = 0) -> Tensor:
    """`D(x)`: `x` itself without dropout, else a masked copy of the same shape."""
    if lora.dropout == 0.0:
        return x
    return dropout_scale(x, lora.dropout, lora.seed, first_col).mul_(x)


def to_rank(x: Tensor, a_t: Tensor) -> Tensor:
    """`x a_t`, a product with few columns, formed as `(a_t^T x^T)^T`.

    BLAS runs products with a short side at several times the speed when that side comes first, and
    accumulates into such a transposed result as fast.

    Args:
        x: `(T, n)`.
        a_t: `(n, r)`.

    Returns:
        `(T, r)`, a view of a contiguous `(r, T)`.
    """
    return (a_t.t() @ x.t()).t()


def lora_h(x: Tensor, lora: Lora) -> Tensor:
    """`h = D(x) A^T`, `(T, r)`: formed, or read where it was kept."""
    if lora.h is None:
        return to_rank(dropped(x, lora), lora.a.t())
    if not lora.h_ready:
        torch.mm(lora.a, dropped(x, lora).t(), out=lora.h)
    return lora.h.t()


def zeros_of_rank(tokens: int, like: Tensor, rank: int) -> Tensor:
    """Zeros `(T, r)` laid out as `to_rank` lays its result out."""
    return like.new_zeros(rank, tokens).t()


def add_lora_input_gradient_(dx: Tensor, dh: Tensor, lora: Lora, first_col: int = 0) -> None:
    """`dx += D'(dh A)`, for all columns of the input or for one tile of them.

    Args:
        dx: `(T, C)`, columns `[first_col, first_col + C)` of the input's gradient, added to.
        dh: `(T, r)`.
        lora: the adapter, for A and the dropout mask.
        first_col: where the tile begins.
    """
    a = lora.a[:, first_col : first_col + dx.shape[1]]
    if lora.dropout == 0.0:
        dx.addmm_(dh, a)
        return
    for start, stop in row_spans(*dx.shape):
        rows = dx[start:stop]
        scale = dropout_scale(rows, lora.dropout, lora.seed, first_col, start)
        rows.add_(scale.mul_(dh[start:stop] @ a))


def add_undropped_(dx: Tensor, d_dropped: Tensor, lora: Lora, first_col: int = 0) -> None:
    """`dx += D'(d_dropped)`, `(T, C)` each: from the gradient of `D(x)` to that of `x`."""
    for start, stop in row_spans(*dx.shape):
        rows = dx[start:stop]
        scale = dropout_scale(rows, lora.dropout, lora.seed, first_col, start)
        rows.add_(scale.mul_(d_dropped[start:stop]))


def linear_forward(x: Tensor, linear: Linear, out: Tensor, tile: Tensor, beta: float = 0.0) -> None:
    """`out = beta * out + x W^T + b + s h B^T`.

    Args:
        x: `(T, in)`.
        linear: W, b and the adapter.
        out: `(T, out)`, overwritten, or added to with `beta = 1`.
        tile: flat buffer for a widened tile of W.
        beta: what the old content of `out` is multiplied by; 0 where there is a magnitude.
    """
    if linear.lora is not None and linear.magnitude is not None:
        assert beta == 0.0
        _dora_forward(x, linear, linear.lora, linear.magnitude.factor, out, tile)
        return
    matmul_(out, x, linear.weight, tile, beta)
    if linear.bias is not None:
        out.add_(linear.bias)
    if linear.lora is not None:
        out.addmm_(lora_h(x, linear.lora), linear.lora.b.t(), alpha=linear.lora.scale)


def linear_backward(
    dy: Tensor, x: Tensor, linear: Linear, dx: Tensor | None, tile: Tensor, *, emit: Emit
) -> None:
    """Add the input gradient to `dx` and emit the adapter's gradients.

    Args:
        dy: `(T, out)`.
        x: `(T, in)`, the forward's input; all that the backward needs of it.
        linear: W, b and the adapter.
        dx: `(T, in)`, added to; None where nobody needs it (the first block).
        tile: flat buffer for a widened tile of W.
        emit: receives (dA, dB), and dm, once they have been used for the last time.
    """
    lora = linear.lora
    if lora is not None and lora.magnitude is not None:
        _dora_backward(dy, x, linear, lora, lora.magnitude, dx, tile, emit)
        return
    if dx is not None:
        matmul_t_(dx, dy, linear.weight, tile)
    if lora is None:
        return
    x_dropped = dropped(x, lora)
    h = to_rank(x_dropped, lora.a.t()) if lora.h is None else lora_h(x, lora)
    db = to_rank(dy.t(), h).contiguous().mul_(lora.scale)
    dh = to_rank(dy, lora.b).mul_(lora.scale)
    da = dh.t() @ x_dropped
    if dx is not None:
        add_lora_input_gradient_(dx, dh, lora)
    emit(da, db)


def _dora_forward(
    x: Tensor, linear: Linear, lora: Lora, factor: Tensor, out: Tensor, tile: Tensor
) -> None:
    """`out = x W^T + b + s h B^T + (c - 1) u`, in place from u on."""
    x_dropped = dropped(x, lora)
    h = to_rank(x_dropped, lora.a.t()) if lora.h is None else lora_h(x, lora)
    matmul_(out, x_dropped, linear.weight, tile)
    out.addmm_(h, lora.b.t(), alpha=lora.scale)
    if lora.dropout == 0.0:
        out.mul_(factor)
    else:
        out.mul_(factor - 1.0)
        matmul_(out, x, linear.weight, tile, beta=1.0)
        out.addmm_(h, lora.b.t(), alpha=lora.scale)
    if linear.bias is not None:
        out.add_(linear.bias)


def _dora_backward(
    dy: Tensor,
    x: Tensor,
    linear: Linear,
    lora: Lora,
    magnitude: Magnitude,
    dx: Tensor | None,
    tile: Tensor,
    emit: Emit,
) -> None:
    """`linear_backward` with a magnitude; the frozen part of u is formed again, tile by tile."""
    factor, weight = magnitude.factor, linear.weight
    x_dropped = dropped(x, lora)
    h = to_rank(x_dropped, lora.a.t()) if lora.h is None else lora_h(x, lora)
    db = to_rank(dy.t(), h).contiguous().mul_(lora.scale)  # of B, but for c
    dfactor = (db * lora.b).sum(1)
    d_dropped, applied = dx, factor
    if dx is not None and lora.dropout > 0.0:
        d_dropped, applied = torch.zeros_like(dx), factor - 1.0
        matmul_t_(dx, dy, weight, tile)
    step = min(DORA_ROWS, weight.rows_per_tile(tile))
    scratch = x.new_empty(x.shape[0] * min(step, weight.shape[0]))
    for start, stop in spans(weight.shape[0], step):
        rows, part = weight.rows(start, stop, tile), dy[:, start:stop]
        frozen = product_(scratch[: part.numel()].view(part.shape), x_dropped, rows.t())
        dfactor[start:stop] += column_dots(frozen, part)
        if d_dropped is not None:
            add_product_(d_dropped, torch.mul(part, applied[start:stop], out=frozen), rows)
    dh = to_rank(dy, lora.b * factor.unsqueeze(1)).mul_(lora.scale)
    da = dh.t() @ x_dropped
    if dx is not None and d_dropped is not None:
        d_dropped.addmm_(dh, lora.a)
        if d_dropped is not dx:
            add_undropped_(dx, d_dropped, lora)
    emit(da, db.mul_(factor.unsqueeze(1)), dfactor.div_(magnitude.norm))
