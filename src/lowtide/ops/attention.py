"""Causal grouped-query attention over ragged segments, in tiles of queries.

    S = scale Q K^T (keys up to the query)   P = softmax(S)   O = P V   lse = logsumexp(S)
    backward: P = exp(S - lse), D = rowsum(dO * O)
              dV += P^T dO   dS = P * (dO V^T - D)   dQ = scale dS K   dK += scale dS^T Q

With a softcap c, S becomes `c tanh(S / c)` and dS is multiplied by `1 - tanh(S / c)^2`. With a
window w, a query sees the last w keys up to its own; keys that no row of a tile sees are skipped.

As in FlashAttention (arXiv 2205.14135), with one softmax per row tile because a tile sees all of
its keys. The `g` query heads that share a key/value head are folded into rows, so that K and V are
never repeated. Saved: `lse (T, heads)`. A score tile holds at most `score_elements` numbers: memory
grows with T, not with T^2, and keys above the diagonal are skipped tile by tile.

Whole sequences on a CPU go to the fused kernel of `ops.fused_attention` where torch has it; the
tiles serve all else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .elementwise import exp_below_zero_
from .fused_attention import available, elements, fused_backward, fused_forward

_GOOD_ELEMENTS = 1 << 16
_WINDOW_ROWS = 64


class Segment(NamedTuple):
    """One sequence: its query rows and its key rows. The last query sees the last key."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int


class Heads(NamedTuple):
    """How the columns of q `(T, num * dim)` and of k and v `(T, num_kv * dim)` are divided.

    Attributes:
        num: query heads.
        num_kv: key/value heads.
        dim: columns of each.
        scale: of the scores; None is `dim ** -0.5`.
        softcap: c of `c tanh(S / c)`; 0 caps nothing.
        window: keys that a query sees, its own included; 0 lets it see all before it.
    """

    num: int
    num_kv: int
    dim: int
    scale: float | None = None
    softcap: float = 0.0
    window: int = 0

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.num // self.num_kv

    @property
    def factor(self) -> float:
        """What q k^T is multiplied by."""
        return self.dim**-0.5 if self.scale is None else self.scale

    def is_plain(self, keys: int) -> bool:
        """Whether nothing but causality bends or hides the scores of up to `keys` keys."""
        return not self.softcap and (not self.window or self.window >= keys)

    def reach(self, keys: int) -> int:
        """Keys that one tile sees at most, of sequences of up to `keys`."""
        return min(keys, self.window + max(self.window, _WINDOW_ROWS)) if self.window else keys


def self_segments(lengths: Sequence[int]) -> list[Segment]:
    """Segments of sequences laid end to end, each attending to itself."""
    segments, start = [], 0
    for length in lengths:
        segments.append(Segment(start, start + length, start, start + length))
        start += length
    return segments


def score_elements(max_keys: int, group: int = 1) -> int:
    """Elements of a score tile: enough rows for an efficient product, linear in the keys.

    At least one query row of a whole group of heads fits.
    """
    return max(1 << 17, max(64, group) * max_keys)


class _Tile(NamedTuple):
    """Query rows `[q0, q1)` against key rows `[k0, k1)` for key/value heads `[h0, h1)`."""

    q0: int
    q1: int
    k0: int
    k1: int
    h0: int
    h1: int


def _tiles(segments: Sequence[Segment], heads: Heads, capacity: int) -> Iterator[_Tile]:
    """Tiles whose scores fit in `capacity` elements: all kv heads at once where rows stay many."""
    for segment in segments:
        num_keys = heads.reach(segment.k_stop - segment.k_start)
        num_queries = segment.q_stop - segment.q_start
        per_row = heads.group * num_keys
        # Enough rows for an efficient product, but half the queries at most, so that what lies
        # above the diagonal is mostly skipped.
        enough = max(16, 64 // heads.group, _GOOD_ELEMENTS // (per_row * heads.num_kv))
        wanted = max(1, min(-(-num_queries // 2), enough))
        kv_heads = max(1, min(heads.num_kv, capacity // max(1, per_row * wanted)))
        rows = max(1, min(max(wanted, num_queries // 4), capacity // (per_row * kv_heads)))
        rows = min(rows, max(heads.window, _WINDOW_ROWS)) if heads.window else rows
        for q0 in range(segment.q_start, segment.q_stop, rows):
            q1 = min(q0 + rows, segment.q_stop)
            k1 = segment.k_stop - (segment.q_stop - q1)
            k0 = segment.k_start
            if heads.window:
                k0 = max(k0, k1 - (q1 - q0) + 1 - heads.window)
            for h0 in range(0, heads.num_kv, kv_heads):
                yield _Tile(q0, q1, k0, k1, h0, min(h0 + kv_heads, heads.num_kv))


def allocated_elements(
    segments: Sequence[Segment],
    heads: Heads,
    dtype: torch.dtype,
    capacity: int,
    *,
    backward: bool,
) -> int:
    """Elements that attention on a CPU allocates at most, beside the score buffers.

    Args:
        segments: of the batch, each a whole sequence.
        heads: the division into heads.
        dtype: of the computation.
        capacity: elements of a score buffer.
        backward: whether keys' gradients are formed too.

    Returns:
        What the fused kernel makes; or, of a tile, the folded rows of q, do and their product, or
        the gradient of its keys.
    """
    keys = max(segment.k_stop - segment.k_start for segment in segments)
    if available(dtype) and heads.is_plain(keys):
        return elements(keys, heads.num, heads.num_kv, heads.dim, backward=backward)
    most = 0
    for tile in _tiles(segments, heads, capacity):
        kv_heads = tile.h1 - tile.h0
        rows = (tile.q1 - tile.q0) * kv_heads * heads.group * heads.dim
        per_key = (tile.k1 - tile.k0) * kv_heads * heads.dim if backward else 0
        most = max(most, (3 if backward else 2) * rows, 2 * rows + per_key)
    return most


def _fold(x: Tensor, tile: _Tile, heads: Heads) -> Tensor:
    """Rows of q-like `x` as `(kv heads, rows * group, dim)`; a view of `x` where that can be."""
    rows = x[tile.q0 : tile.q1].view(tile.q1 - tile.q0, heads.num_kv, heads.group, heads.dim)
    return rows[:, tile.h0 : tile.h1].transpose(0, 1).reshape(tile.h1 - tile.h0, -1, heads.dim)


def _unfold_into(folded: Tensor, out: Tensor, tile: _Tile, heads: Heads) -> None:
    """The inverse of `_fold`: write the tile back into its rows and heads of `out`."""
    count = tile.q1 - tile.q0
    rows = out[tile.q0 : tile.q1].view(count, heads.num_kv, heads.group, heads.dim)
    per_head = folded.view(tile.h1 - tile.h0, count, heads.group, heads.dim)
    rows[:, tile.h0 : tile.h1].copy_(per_head.transpose(0, 1))


def _per_kv_head(x: Tensor, tile: _Tile, heads: Heads) -> Tensor:
    """Key rows of k-like `x` as a `(kv heads, keys, dim)` view."""
    keys = x[tile.k0 : tile.k1].view(tile.k1 - tile.k0, heads.num_kv, heads.dim)
    return keys[:, tile.h0 : tile.h1].transpose(0, 1)


def _scores(q: Tensor, k: Tensor, heads: Heads, buffer: Tensor) -> Tensor:
    """S of a tile, `(kv heads, rows * group, keys)`; with a softcap c, `tanh(S / c)`."""
    shape = (q.shape[0], q.shape[1], k.shape[1])
    scores = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
    # The scale goes into the product: a folded q can be a view of the caller's.
    scale = heads.factor / heads.softcap if heads.softcap else heads.factor
    torch.baddbmm(scores, q, k.transpose(1, 2), beta=0.0, alpha=scale, out=scores)
    return scores.tanh_() if heads.softcap else scores


def _fill_hidden_(scores: Tensor, tile: _Tile, heads: Heads, value: float) -> None:
    """Set what lies above the diagonal, in the last keys of the tile, and what left the window."""
    count, keys = tile.q1 - tile.q0, scores.shape[2]
    future = torch.ones(count, count, dtype=torch.bool, device=scores.device).triu_(1)
    rows = scores.view(scores.shape[0], count, heads.group, keys)
    rows[:, :, :, keys - count :].masked_fill_(future.unsqueeze(1), value)
    if heads.window:
        # The window of row i begins i keys after that of row 0, and the tile perhaps later still.
        late = tile.k0 - (tile.k1 - count + 1 - heads.window)
        left = torch.ones(count, min(count, keys), dtype=torch.bool, device=scores.device)
        left.tril_(-1 - late)
        rows[:, :, :, : left.shape[1]].masked_fill_(left.unsqueeze(1), value)


def is_fused(q: Tensor, segments: Sequence[Segment], heads: Heads) -> bool:
    """Whether the fused kernel takes these: whole sequences on a CPU, with no cap and no window.

    Args:
        q: queries, for their dtype and device.
        segments: which rows belong together.
        heads: what happens to the scores.

    Returns:
        False where the tiles are used.
    """
    whole = all(
        s.q_start == s.k_start and s.q_stop == s.k_stop and heads.is_plain(s.k_stop - s.k_start)
        for s in segments
    )
    return whole and q.device.type == "cpu" and available(q.dtype)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Heads,
    segments: Sequence[Segment],
    *,
    out: Tensor,
    score: Tensor,
) -> Tensor:
    """Attend, segment by segment, each query to the keys at and before its position.

    Args:
        q: `(T, num * dim)`.
        k: `(S, num_kv * dim)`; S = T unless earlier keys come from a cache.
        v: `(S, num_kv * dim)`.
        heads: the division into heads.
        segments: which rows belong together.
        out: `(T, num * dim)`, overwritten; must not overlap `q`.
        score: flat buffer of at least one row's `group * keys` elements, for tiles.

    Returns:
        `lse (T, num)`: T num elements, saved for the backward.
    """
    if is_fused(q, segments, heads):
        spans = [(segment.q_start, segment.q_stop) for segment in segments]
        return fused_forward(q, k, v, heads.dim, spans, out=out, scale=heads.factor)
    return tiled_forward(q, k, v, heads, segments, out=out, score=score)


def tiled_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Heads,
    segments: Sequence[Segment],
    *,
    out: Tensor,
    score: Tensor,
) -> Tensor:
    """`attention_forward` in tiles, on any device and for any segments."""
    lse = q.new_empty(q.shape[0], heads.num)
    for tile in _tiles(segments, heads, score.numel()):
        keys, values = _per_kv_head(k, tile, heads), _per_kv_head(v, tile, heads)
        p = _scores(_fold(q, tile, heads), keys, heads, score)
        if heads.softcap:
            p.mul_(heads.softcap)
        _fill_hidden_(p, tile, heads, float("-inf"))
        top = p.amax(-1, keepdim=True)
        exp_below_zero_(p.sub_(top))
        _fill_hidden_(p, tile, heads, 0.0)
        total = p.sum(-1, keepdim=True)
        folded = torch.bmm(p, values).div_(total)
        _unfold_into(folded, out, tile, heads)
        _unfold_into(total.log_().add_(top), lse, tile, heads._replace(dim=1))
    return lse


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    heads: Heads,
    segments: Sequence[Segment],
    *,
    dk: Tensor,
    dv: Tensor,
    scores: Sequence[Tensor],
) -> None:
    """Turn `q` into dq in place and overwrite `dk` and `dv`; `do` is left as it was.

    Args:
        do: `(T, num * dim)`, gradient of the output.
        q: `(T, num * dim)`, overwritten with its gradient.
        k: `(T, num_kv * dim)`.
        v: `(T, num_kv * dim)`.
        o: `(T, num * dim)`, the forward's output; may be overwritten.
        lse: `(T, num)` from the forward.
        heads: the division into heads.
        segments: which rows belong together.
        dk: `(T, num_kv * dim)`, overwritten.
        dv: `(T, num_kv * dim)`, overwritten.
        scores: two flat buffers as in the forward.
    """
    if is_fused(q, segments, heads):
        spans = [(segment.q_start, segment.q_stop) for segment in segments]
        fused_backward(do, q, k, v, o, lse, heads.dim, spans, dk=dk, dv=dv, scale=heads.factor)
    else:
        tiled_backward(do, q, k, v, o, lse, heads, segments, dk=dk, dv=dv, scores=scores)


def tiled_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    heads: Heads,
    segments: Sequence[Segment],
    *,
    dk: Tensor,
    dv: Tensor,
    scores: Sequence[Tensor],
) -> None:
    """`attention_backward` in tiles, on any device and for any segments."""
    scale = heads.factor
    dk.zero_()
    dv.zero_()
    delta = o.mul_(do).view(o.shape[0], heads.num, heads.dim).sum(-1)
    per_row = heads._replace(dim=1)
    for tile in _tiles(segments, heads, scores[0].numel()):
        keys, values = _per_kv_head(k, tile, heads), _per_kv_head(v, tile, heads)
        q_tile, do_tile = _fold(q, tile, heads), _fold(do, tile, heads)
        p = _scores(q_tile, keys, heads, scores[0])
        if heads.softcap:
            p.mul_(heads.softcap)
        p.sub_(_fold(lse, tile, per_row))
        _fill_hidden_(p, tile, heads, 0.0)  # a hidden score may exceed lse and overflow
        exp_below_zero_(p)
        _fill_hidden_(p, tile, heads, 0.0)
        _per_kv_head(dv, tile, heads).add_(torch.bmm(p.transpose(1, 2), do_tile))
        ds = torch.bmm(do_tile, values.transpose(1, 2), out=scores[1][: p.numel()].view(p.shape))
        ds.sub_(_fold(delta, tile, per_row)).mul_(p)
        if heads.softcap:  # tanh again, where P was: a third score tile would cost more
            ds.addcmul_(ds, _scores(q_tile, keys, heads, scores[0]).square_(), value=-1.0)
        _per_kv_head(dk, tile, heads).add_(torch.bmm(ds.transpose(1, 2), q_tile), alpha=scale)
        _unfold_into(torch.bmm(ds, keys).mul_(scale), q, tile, heads)
