"""The only block: attention and a gated MLP, each between norms; forward and backward by hand.

    mid = x + s post_a(Attention(pre_a(x)) Wo^T)      y = mid + s post_m(MLP(pre_m(mid)))

Each norm may be there or not, and s is 1 for most models. The forward keeps nothing: the caller
keeps the block's input. The backward recomputes q, k, v, the attention output, the middle residual
and the MLP's tiles from that input, walks them in reverse and hands each adapter gradient out as
soon as its A and B are not needed any more. What is never recomputed because nothing needs it: the
down projection's product, unless a norm follows it, and, in the first block, the gradient of the
input (embeddings are frozen).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lowtide.ops.attention import Heads, Segment, attention_backward, attention_forward
from lowtide.ops.glu import Columns, Glu, glu_backward, glu_forward
from lowtide.ops.lora_linear import Linear, linear_backward, linear_forward
from lowtide.ops.rmsnorm import rmsnorm_backward_, rmsnorm_forward, rmsnorm_gradient
from lowtide.ops.rope import rope_

from .projections import Gradients, with_one_h
from .spec import Projection
from .workspace import Workspace


class Norms(NamedTuple):
    """Weights of a block's norms `(H,)`, and of those on q and k; None where there is none."""

    before_attention: Tensor | None
    after_attention: Tensor | None
    before_mlp: Tensor | None
    after_mlp: Tensor | None
    q: Tensor | None
    k: Tensor | None


class Block(NamedTuple):
    """Weights of one block, this step's adapters on them, and what its attention does.

    Attributes:
        norms: weights of the norms.
        q: projection of the queries.
        k: of the keys.
        v: of the values.
        o: of the attention output.
        glu: the MLP.
        projections: which of these belong together in the adapter.
        heads: the division into heads, and what happens to scores.
        rope: place of the rotary table; None rotates nothing.
        eps: of the norms.
        scale: s of the branches.
    """

    norms: Norms
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    glu: Glu
    projections: Sequence[Projection]
    heads: Heads
    rope: int | None
    eps: float
    scale: float


class Positions(NamedTuple):
    """What attention knows of a batch: sequences, and rotary tables `(T, rotated / 2)` each."""

    segments: Sequence[Segment]
    tables: Sequence[tuple[Tensor, Tensor]]


class LayerCache(Protocol):
    """Keys and values of earlier tokens of one layer, for generation."""

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append new rows `(T, kv_width)`; return all rows so far."""


class _Attended(NamedTuple):
    """What the attention half leaves in the workspace, or where it is kept."""

    rstd: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    raw: Sequence[tuple[Tensor, Tensor]]
    """q and k before their norms, with the rstd of those."""


class Kept:
    """What the backward of a block needs, kept from its forward instead of recomputed.

    Room for q and o `(T, q_width)`, k and v `(T, kv_width)`, the middle residual `(T, H)`, the
    MLP's columns; where they have norms, q and k before them and the MLP's output `(T, H)`.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        mid: Tensor,
        *,
        columns: Columns,
        raw: Sequence[Tensor] = (),
        branch: Tensor | None = None,
    ) -> None:
        """Take the tensors, whose content the forward writes."""
        self.q, self.k, self.v, self.o, self.mid = q, k, v, o, mid
        self.columns, self.raw, self.branch = columns, raw, branch
        self.attended: _Attended | None = None


def _normed(x: Tensor, weight: Tensor | None, eps: float, out: Tensor) -> Tensor | None:
    """`norm(x)` into `out`, and its rstd; nothing without a weight."""
    return None if weight is None else rmsnorm_forward(x, weight, eps, out=out)


def _per_head(x: Tensor, weight: Tensor) -> Tensor:
    """Rows that a norm on q or k sees: whole ones, or one for each head."""
    return x.view(-1, weight.shape[0])


def _attend(
    x: Tensor,
    block: Block,
    at: Positions,
    ws: Workspace,
    cache: LayerCache | None = None,
    keep: Kept | None = None,
) -> _Attended:
    """norm, q/k/v, their norms, rope and attention; results lie in the workspace or in `keep`."""
    tokens, heads = x.shape[0], block.heads
    n = x if block.norms.before_attention is None else ws.wide(0, tokens, x.shape[1])
    rstd = _normed(x, block.norms.before_attention, block.eps, n)
    if keep is None:
        width = heads.num * heads.dim
        q, o = ws.wide(1, tokens, width), ws.wide(2, tokens, width)
        k, v = ws.narrow(0, tokens), ws.narrow(1, tokens)
        raw = ws.raw(tokens)
    else:
        q, k, v, o, raw = keep.q, keep.k, keep.v, keep.o, tuple(keep.raw)
    targets = (*raw, v) if raw else (q, k, v)
    linears = with_one_h(n, (block.q, block.k, block.v))
    for linear, out in zip(linears, targets, strict=True):
        linear_forward(n, linear, out, ws.linear_tile)
    stats = []
    for before, after, weight in zip(raw, (q, k), (block.norms.q, block.norms.k), strict=False):
        assert weight is not None
        shaped = _per_head(before, weight)
        found = rmsnorm_forward(shaped, weight, block.eps, out=_per_head(after, weight))
        stats.append((before, found))
    _rotate((q, k), block, at, ws)
    if cache is not None:
        k, v = cache.extend(k, v)
    lse = attention_forward(q, k, v, heads, at.segments, out=o, score=ws.scores[0])
    return _Attended(rstd, q, k, v, o, lse, stats)


def _rotate(
    these: Sequence[Tensor], block: Block, at: Positions, ws: Workspace, *, inverse: bool = False
) -> None:
    """Rotate q- and k-like tensors in place, where the block does."""
    if block.rope is not None:
        cos, sin = at.tables[block.rope]
        for one in these:
            rope_(one, cos, sin, ws.rope_scratch(), inverse, head_dim=block.heads.dim)


def _add_branch(
    out: Tensor, branch: Tensor, weight: Tensor | None, block: Block, n: Tensor
) -> None:
    """`out += s norm(branch)`; `n (T, H)` takes the norm."""
    if weight is not None:
        rmsnorm_forward(branch, weight, block.eps, out=n)
        branch = n
    out.add_(branch, alpha=block.scale)


def _apart(linear: Linear, norm: Tensor | None, block: Block) -> bool:
    """Whether a branch cannot be summed where its residual is: something multiplies its sum."""
    return norm is not None or block.scale != 1.0 or linear.magnitude is not None


def _add_attention(out: Tensor, attended: Tensor, block: Block, ws: Workspace) -> None:
    """`out += s post_a(attended Wo^T)`."""
    weight = block.norms.after_attention
    if not _apart(block.o, weight, block):
        linear_forward(attended, block.o, out, ws.linear_tile, beta=1.0)
        return
    branch, n = ws.wide(4, *out.shape), ws.wide(0, *out.shape)
    linear_forward(attended, block.o, branch, ws.linear_tile)
    _add_branch(out, branch, weight, block, n)


def _mlp(n: Tensor, glu: Glu) -> Glu:
    """The MLP with h of gate and up formed once where they share an adapter."""
    gate, up = with_one_h(n, (glu.gate, glu.up))
    return glu._replace(gate=gate, up=up)


def block_forward(
    x: Tensor,
    block: Block,
    at: Positions,
    ws: Workspace,
    out: Tensor,
    cache: LayerCache | None = None,
    keep: Kept | None = None,
) -> None:
    """`out` becomes y of the module's formula.

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
    _add_attention(out, attended.o, block, ws)
    if keep is not None:
        keep.attended = attended
        keep.mid.copy_(out)
    columns = None if keep is None else keep.columns
    n = ws.wide(0, *x.shape)
    if _normed(out, block.norms.before_mlp, block.eps, n) is None:
        n.copy_(out)
    if not _apart(block.glu.down, block.norms.after_mlp, block):
        glu_forward(n, _mlp(n, block.glu), out, ws.glu, columns)
        return
    kept = None if keep is None else keep.branch
    branch = ws.wide(4, *x.shape) if kept is None else kept
    glu_forward(n, _mlp(n, block.glu), branch.zero_(), ws.glu, columns)
    _add_branch(out, branch, block.norms.after_mlp, block, n)


def block_backward(
    dy: Tensor,
    x: Tensor,
    block: Block,
    at: Positions,
    ws: Workspace,
    *,
    emit: Callable[..., None],
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
        emit: called with (projection's name, dA, dB), and dm under DoRA, when A, B and m are not
            needed any more.
        input_gradient: False in the first block; `dy` is then left meaningless.
        kept: what the forward of this block kept, overwritten; None where it kept nothing.
    """
    grads = Gradients(block.projections, emit)
    if kept is None or kept.attended is None:
        attended = _attend(x, block, at, ws)
        mid = ws.wide(3, *x.shape).copy_(x)
        _add_attention(mid, attended.o, block, ws)
    else:
        attended, mid = kept.attended, kept.mid
    _mlp_backward(dy, mid, block, ws, grads, kept)
    _attention_backward(dy, x, block, at, ws, attended, grads, input_gradient)


def _branch_gradient(
    dy: Tensor, branch: Tensor | None, weight: Tensor | None, block: Block, out: Tensor
) -> Tensor:
    """The gradient of `branch` from that of `s norm(branch)`; `dy` itself where they are one."""
    if weight is None:
        return dy if block.scale == 1.0 else torch.mul(dy, block.scale, out=out)
    assert branch is not None
    # The norm goes into `out` only for its rstd.
    rstd = rmsnorm_forward(branch, weight, block.eps, out=out)
    rmsnorm_gradient(dy, branch, weight, rstd, out=out)
    return out if block.scale == 1.0 else out.mul_(block.scale)


def _mlp_backward(
    dy: Tensor, mid: Tensor, block: Block, ws: Workspace, grads: Gradients, kept: Kept | None
) -> None:
    """The MLP's half: `dy` becomes the gradient of the middle residual."""
    n, dn = ws.wide(0, *mid.shape), ws.wide(4, *mid.shape)
    rstd = _normed(mid, block.norms.before_mlp, block.eps, n)
    n = mid if rstd is None else n
    glu = _mlp(n, block.glu)
    weight, branch = block.norms.after_mlp, None
    if weight is not None and (kept is None or kept.branch is None):
        branch = dn.zero_()
        glu_forward(n, glu, branch, ws.glu)
    elif kept is not None:
        branch = kept.branch
    db = dy
    if weight is not None or block.scale != 1.0:
        db = _branch_gradient(dy, branch, weight, block, ws.wide(5, *mid.shape))
    columns = None if kept is None else kept.columns
    emits = [grads.of(role) for role in ("gate", "up", "down")]
    glu_backward(db, n, glu, dn, ws.glu, emits=emits, kept=columns)
    if rstd is None or block.norms.before_mlp is None:
        dy.add_(dn)
    else:
        rmsnorm_backward_(dy, dn, mid, block.norms.before_mlp, rstd, scratch=n)


def _attention_backward(
    dy: Tensor,
    x: Tensor,
    block: Block,
    at: Positions,
    ws: Workspace,
    attended: _Attended,
    grads: Gradients,
    input_gradient: bool,
) -> None:
    """The attention half: `dy` is the gradient of the middle residual, then of `x`."""
    tokens, hidden = x.shape
    q, k, v, o, lse = attended.q, attended.k, attended.v, attended.o, attended.lse
    n, dn = ws.wide(0, tokens, hidden), ws.wide(4, tokens, hidden)
    weight = block.norms.after_attention
    if weight is not None:
        linear_forward(o, block.o, n, ws.linear_tile)
    db = _branch_gradient(dy, n, weight, block, dn)
    do = ws.wide(3, tokens, q.shape[1]).zero_()
    linear_backward(db, o, block.o, do, ws.linear_tile, emit=grads.of("o"))
    dk, dv = ws.narrow(2, tokens), ws.narrow(3, tokens)
    attention_backward(
        do, q, k, v, o, lse, block.heads, at.segments, dk=dk, dv=dv, scores=ws.scores
    )
    _rotate((q, dk), block, at, ws, inverse=True)
    for (before, rstd), after, one in zip(attended.raw, (q, dk), block.norms[4:], strict=False):
        assert one is not None
        shaped, rows = _per_head(after, one), _per_head(before, one)
        rmsnorm_gradient(shaped, rows, one, rstd, out=shaped)
    before_attention = block.norms.before_attention
    dx: Tensor | None = None
    if before_attention is None or attended.rstd is None:
        n, dx = x, dy if input_gradient else None
    else:
        torch.mul(x, attended.rstd, out=n).mul_(before_attention)
        dx = dn.zero_() if input_gradient else None
    linears = with_one_h(n, (block.q, block.k, block.v))
    for role, linear, dout in zip("qkv", linears, (q, dk, dv), strict=True):
        linear_backward(dout, n, linear, dx, ws.linear_tile, emit=grads.of(role))
    if input_gradient and before_attention is not None and attended.rstd is not None:
        rmsnorm_backward_(dy, dn, x, before_attention, attended.rstd, scratch=n)
