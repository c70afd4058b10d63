"""The only block: RMSNorm, rotary GQA attention, RMSNorm, SwiGLU; forward and backward by hand.

The forward keeps nothing: the caller keeps the block's input. The backward recomputes q, k, v, the
attention output, the middle residual and the MLP's tiles from that input, walks them in reverse and
hands each adapter gradient out as soon as its A and B are not needed any more. What is never
recomputed because nothing needs it: the down projection's product, and, in the first block, the
gradient of the input (embeddings are frozen).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lowtide.ops.attention import Heads, Segment, attention_backward, attention_forward
from lowtide.ops.glu import Columns, Glu, glu_backward, glu_forward
from lowtide.ops.lora_linear import Emit, Linear, linear_backward, linear_forward
from lowtide.ops.rmsnorm import rmsnorm_backward_, rmsnorm_forward
from lowtide.ops.rope import rope_

from .workspace import Workspace


class Block(NamedTuple):
    """Weights of one block and this step's adapters on them."""

    input_norm: Tensor
    mlp_norm: Tensor
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    glu: Glu
    eps: float


class Positions(NamedTuple):
    """What attention knows of a batch: its sequences, and rotary tables `(T, head_dim / 2)`."""

    segments: Sequence[Segment]
    heads: Heads
    cos: Tensor
    sin: Tensor


class LayerCache(Protocol):
    """Keys and values of earlier tokens of one layer, for generation."""

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append new rows `(T, kv_width)`; return all rows so far."""


class _Attended(NamedTuple):
    """What the attention half leaves in the workspace, or where it is kept."""

    rstd: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor


class Kept:
    """What the backward of a block needs, kept from its forward instead of recomputed.

    Room for q and o `(T, q_width)`, k and v `(T, kv_width)`, the middle residual `(T, H)`, and the
    MLP's columns.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, mid: Tensor, columns: Columns
    ) -> None:
        """Take the tensors, whose content the forward writes."""
        self.q, self.k, self.v, self.o, self.mid = q, k, v, o, mid
        self.columns = columns
        self.attended: _Attended | None = None


def _attend(
    x: Tensor,
    block: Block,
    at: Positions,
    ws: Workspace,
    cache: LayerCache | None = None,
    keep: Kept | None = None,
) -> _Attended:
    """norm, q/k/v, rope and attention of `x (T, H)`; results lie in the workspace, or in `keep`."""
    tokens = x.shape[0]
    n = ws.wide(0, tokens, x.shape[1])
    rstd = rmsnorm_forward(x, block.input_norm, block.eps, out=n)
    if keep is None:
        width = at.heads.num * at.heads.dim
        q, o = ws.wide(1, tokens, width), ws.wide(2, tokens, width)
        k, v = ws.narrow(0, tokens), ws.narrow(1, tokens)
    else:
        q, k, v, o = keep.q, keep.k, keep.v, keep.o
    for linear, out in ((block.q, q), (block.k, k), (block.v, v)):
        linear_forward(n, linear, out, ws.tile)
    for rotated in (q, k):
        rope_(rotated, at.cos, at.sin, ws.rope_scratch())
    if cache is not None:
        k, v = cache.extend(k, v)
    lse = attention_forward(q, k, v, at.heads, at.segments, out=o, score=ws.scores[0])
    return _Attended(rstd, q, k, v, o, lse)


def block_forward(
    x: Tensor,
    block: Block,
    at: Positions,
    ws: Workspace,
    out: Tensor,
    cache: LayerCache | None = None,
    keep: Kept | None = None,
) -> None:
    """`out = mid + MLP(norm(mid))`, `mid = x + Attention(norm(x)) Wo^T`.

    Args:
        x: `(T, H)`, the block's input; the one thing worth keeping for the backward.
        block: weights and adapters.
        at: segments and rotary tables.
        ws: buffers, overwritten.
        out: `(T, H)`, overwritten; must not overlap `x`.
        cache: earlier keys and values when generating.
        keep: takes what the backward needs; None where it recomputes that.
    """
    attended = _attend(x, block, at, ws, cache, keep)
    out.copy_(x)
    linear_forward(attended.o, block.o, out, ws.tile, beta=1.0)
    n = ws.wide(0, *x.shape)
    rmsnorm_forward(out, block.mlp_norm, block.eps, out=n)
    if keep is not None:
        keep.attended = attended
        keep.mid.copy_(out)
    glu_forward(n, block.glu, out, ws.glu, None if keep is None else keep.columns)


def block_backward(
    dy: Tensor,
    x: Tensor,
    block: Block,
    at: Positions,
    ws: Workspace,
    *,
    emit: Callable[[str, Tensor, Tensor], None],
    input_gradient: bool = True,
    kept: Kept | None = None,
) -> None:
    """Turn the gradient of the block's output into that of its input, in place.

    Args:
        dy: `(T, H)`, overwritten with the gradient of `x`.
        x: `(T, H)`, the block's input, as the forward had it.
        block: weights and adapters.
        at: segments and rotary tables.
        ws: buffers, overwritten.
        emit: called with (linear's name, dA, dB) when A and B are not needed any more.
        input_gradient: False in the first block; `dy` is then left meaningless.
        kept: what the forward of this block kept, overwritten; None where it kept nothing.
    """
    tokens, hidden = x.shape
    n, mid, dn = (ws.wide(i, tokens, hidden) for i in (0, 3, 4))
    if kept is None or kept.attended is None:
        attended = _attend(x, block, at, ws)
        mid.copy_(x)
        linear_forward(attended.o, block.o, mid, ws.tile, beta=1.0)
    else:
        attended, mid = kept.attended, kept.mid
    rstd = rmsnorm_forward(mid, block.mlp_norm, block.eps, out=n)
    emits = [_named(emit, f"mlp.{name}_proj") for name in ("gate", "up", "down")]
    columns = None if kept is None else kept.columns
    glu_backward(dy, n, block.glu, dn, ws.glu, emits=emits, kept=columns)
    rmsnorm_backward_(dy, dn, mid, block.mlp_norm, rstd, scratch=n)
    _attention_backward(dy, x, block, at, ws, attended, emit, input_gradient)


def _attention_backward(
    dy: Tensor,
    x: Tensor,
    block: Block,
    at: Positions,
    ws: Workspace,
    attended: _Attended,
    emit: Callable[[str, Tensor, Tensor], None],
    input_gradient: bool,
) -> None:
    """The attention half: `dy` is the gradient of the middle residual, then of `x`."""
    tokens, hidden = x.shape
    do = ws.wide(3, tokens, attended.q.shape[1]).zero_()
    linear_backward(dy, attended.o, block.o, do, ws.tile, emit=_named(emit, "self_attn.o_proj"))
    q, k, v, o, lse = attended.q, attended.k, attended.v, attended.o, attended.lse
    dk, dv = ws.narrow(2, tokens), ws.narrow(3, tokens)
    attention_backward(do, q, k, v, o, lse, at.heads, at.segments, dk=dk, dv=dv, scores=ws.scores)
    for rotated in (q, dk):
        rope_(rotated, at.cos, at.sin, ws.rope_scratch(), inverse=True)
    n = ws.wide(0, tokens, hidden)
    torch.mul(x, attended.rstd, out=n).mul_(block.input_norm)
    dn = ws.wide(4, tokens, hidden).zero_() if input_gradient else None
    for name, linear, dout in (("q", block.q, q), ("k", block.k, dk), ("v", block.v, dv)):
        linear_backward(dout, n, linear, dn, ws.tile, emit=_named(emit, f"self_attn.{name}_proj"))
    if dn is not None:
        rmsnorm_backward_(dy, dn, x, block.input_norm, attended.rstd, scratch=n)


def _named(emit: Callable[[str, Tensor, Tensor], None], name: str) -> Emit:
    """`emit` with the linear's name filled in."""
    return lambda da, db: emit(name, da, db)
