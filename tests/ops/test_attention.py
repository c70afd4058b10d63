"""Tiled attention over ragged segments against torch's own, one sequence and head at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import EPS32, assert_noise_floor, randn, relative
from torch import Tensor

from lowtide.ops.attention import (
    Heads,
    Segment,
    _tiles,
    attention_backward,
    attention_forward,
    is_fused,
    score_elements,
    self_segments,
    tiled_backward,
    tiled_forward,
)

TOLERANCE = 1e-12  # float64 sums of a few hundred terms round at 1e-14
HEADS = [Heads(5, 1, 6), Heads(6, 2, 10), Heads(3, 3, 22), Heads(1, 1, 2)]
# Scores are of order 1, so caps of this size bend them; windows of one key, of a few, of a number
# that tiles do not divide, and of more than there are.
VARIANTS = [
    Heads(5, 1, 6, window=1),
    Heads(6, 2, 10, window=7),
    Heads(3, 3, 22, window=100),
    Heads(6, 2, 10, window=1000),
    Heads(5, 1, 6, scale=0.7),
    Heads(3, 3, 22, softcap=0.8),
    Heads(6, 2, 10, scale=1.3, softcap=1.5, window=11),
]
LENGTHS = [[1], [5], [1, 1, 1], [1, 5, 1, 37, 2], [123]]


def _plain(q: Tensor, k: Tensor, v: Tensor, heads: Heads, lengths: list[int]) -> Tensor:
    """The same function through scaled_dot_product_attention, or, with a softcap, by formula."""
    outputs = []
    for parts in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
        per_head = [t.view(len(t), -1, heads.dim).transpose(0, 1).unsqueeze(0) for t in parts]
        q_i, k_i, v_i = (
            t if i == 0 else t.repeat_interleave(heads.group, 1) for i, t in enumerate(per_head)
        )
        place = torch.arange(len(parts[0]))
        apart = place.unsqueeze(1) - place
        seen = (apart >= 0) & (apart < (heads.window or len(place)))
        if heads.softcap:
            scores = q_i @ k_i.transpose(2, 3) * heads.factor
            scores = heads.softcap * torch.tanh(scores / heads.softcap)
            o = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v_i
        else:
            o = F.scaled_dot_product_attention(q_i, k_i, v_i, seen, scale=heads.factor)
        outputs.append(o[0].transpose(0, 1).reshape(len(parts[0]), -1))
    return torch.cat(outputs)


def _inputs(
    heads: Heads, tokens: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, do = (randn(tokens, heads.num * heads.dim, seed=i, dtype=dtype) for i in (0, 3))
    k, v = (randn(tokens, heads.num_kv * heads.dim, seed=i, dtype=dtype) for i in (1, 2))
    return q, k, v, do


def _ours(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    heads: Heads,
    lengths: list[int],
    capacity: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients, in tiles of a capacity or with None by the fused kernel.

    Every buffer starts as NaN; inputs must stay as they were.
    """
    segments = self_segments(lengths)
    before = [t.clone() for t in (q, k, v, do)]
    out = torch.full_like(q, torch.nan)
    if capacity is None and not heads.is_plain(max(lengths)):
        capacity = score_elements(max(lengths), heads.group)
    scores = [torch.full((capacity or 0,), torch.nan, dtype=q.dtype) for _ in range(2)]
    forward, backward = (
        (attention_forward, attention_backward)
        if capacity is None
        else (tiled_forward, tiled_backward)
    )
    lse = forward(q, k, v, heads, segments, out=out, score=scores[0])
    assert all(t.equal(b) for t, b in zip((q, k, v), before, strict=False)), "input overwritten"
    dq, o = q.clone(), out.clone()
    dk, dv = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    backward(do, dq, k, v, o, lse, heads, segments, dk=dk, dv=dv, scores=scores)
    assert all(t.equal(b) for t, b in zip((q, k, v, do), before, strict=True)), "input overwritten"
    return out, dq, dk, dv


def _capacities(heads: Heads, lengths: list[int]) -> list[int | None]:
    """One row of one kv head, a few rows, the workspace's own size, and the fused kernel."""
    row = heads.group * max(lengths)
    narrow = [row, 3 * row + 1] if max(lengths) < 100 else [11 * row + 1]
    return [*narrow, 17 * row * heads.num_kv, score_elements(max(lengths)), None]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", [*HEADS, *VARIANTS], ids=str)
def test_matches_autograd_in_float64_at_every_tiling(heads: Heads, lengths: list[int]) -> None:
    q, k, v, do = _inputs(heads, sum(lengths))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    truth = _plain(*leaves, heads, lengths)
    gradients = torch.autograd.grad(truth, leaves, do)
    for capacity in _capacities(heads, lengths):
        out, *ours = _ours(q, k, v, do, heads, lengths, capacity)
        assert relative(out, truth) < TOLERANCE
        for name, mine, theirs in zip("qkv", ours, gradients, strict=True):
            # A single token's dq and dk are zero, so measure against the size of dv there.
            size = float(theirs.norm().clamp_min(gradients[2].norm()))
            error = float((mine - theirs).norm()) / size
            assert error < TOLERANCE, f"d{name} at capacity {capacity}: {error:.2e}"


# Without the window of one key, whose dq is the rounding of nothing.
@pytest.mark.parametrize("heads", [*HEADS, *VARIANTS[1:]], ids=str)
@pytest.mark.parametrize("capacity", [score_elements(64), None])
def test_float32_is_as_close_as_the_plain_formula(heads: Heads, capacity: int | None) -> None:
    lengths = [1, 5, 1, 64, 2]
    inputs = _inputs(heads, sum(lengths), torch.float32)

    def plain(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.clone().to(dtype).requires_grad_() for t in inputs[:3]]
        o = _plain(*leaves, heads, lengths)
        return [o.detach(), *torch.autograd.grad(o, leaves, inputs[3].to(dtype))]

    ours = _ours(*inputs, heads, lengths, capacity)
    for mine, naive, truth in zip(ours, plain(torch.float32), plain(torch.float64), strict=True):
        # Scores of size up to |q||k|/sqrt(dim) carry their rounding into the exponent.
        assert_noise_floor(mine, naive, truth, float(truth.abs().max()) * heads.dim**0.5)


@pytest.mark.parametrize("heads", [Heads(6, 2, 10), *VARIANTS[1:3], VARIANTS[-1]], ids=str)
def test_earlier_keys_from_a_cache(heads: Heads) -> None:
    q, k, v, _ = _inputs(heads, 11)
    whole = _plain(q, k, v, heads, [11])
    for first in (0, 3, 10):
        queries = q[first:].clone()
        out = torch.empty_like(queries)
        score = torch.empty(heads.group * 11, dtype=q.dtype)
        segments = [Segment(0, 11 - first, 0, 11)]
        attention_forward(queries, k, v, heads, segments, out=out, score=score)
        assert relative(out, whole[first:]) < TOLERANCE


@pytest.mark.parametrize("capacity", [1 << 17, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_ten_thousand_stay_finite_and_right(
    dtype: torch.dtype, capacity: int | None
) -> None:
    heads, lengths = Heads(4, 2, 4), [9, 4]
    q, k, v, do = (t.to(dtype) for t in _inputs(heads, 13))
    q, k = q * 100, k * 100  # scores up to about 1e4 * |q||k| / 2
    out, dq, dk, dv = _ours(q, k, v, do, heads, lengths, capacity)
    truth = _plain(q.double(), k.double(), v.double(), heads, lengths)
    assert all(torch.isfinite(t).all() for t in (out, dq, dk, dv))
    # A score of 3e4 rounds by 3e4 eps, and so relatively does its exponential.
    tolerance = 1e-10 if dtype is torch.float64 else 3e4 * 8 * EPS32
    assert relative(out, truth) < tolerance
    assert float(out.abs().max()) <= float(v.abs().max()) * (1 + 1e-5)


@pytest.mark.parametrize("heads", [Heads(8, 4, 16), Heads(10, 2, 16), Heads(3, 3, 64)], ids=str)
def test_how_many_heads_go_together_changes_no_bit(heads: Heads) -> None:
    lengths = [40, 3]
    inputs = _inputs(heads, 43, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        few = _ours(*inputs, heads, lengths)
        torch.set_num_threads(8)
        all_heads = _ours(*inputs, heads, lengths)
    finally:
        torch.set_num_threads(threads)
    assert all(a.equal(b) for a, b in zip(few, all_heads, strict=True))


def test_sequences_go_to_the_fused_kernel_and_cached_keys_do_not() -> None:
    q = torch.zeros(3, 4)
    heads = Heads(2, 1, 2)
    assert is_fused(q, self_segments([1, 2]), heads)
    assert not is_fused(q, [Segment(0, 3, 0, 5)], heads)
    assert not is_fused(q.to("meta"), self_segments([3]), heads)
    assert not is_fused(q, self_segments([3]), heads._replace(softcap=9.0))
    assert not is_fused(q, self_segments([1, 2]), heads._replace(window=1))
    assert is_fused(q, self_segments([1, 2]), heads._replace(window=2, scale=3.0))


def test_a_row_of_any_group_of_heads_fits_the_score_buffer() -> None:
    heads = Heads(71, 1, 2)
    keys = 4000
    q, k = torch.zeros(keys, 142), torch.zeros(keys, 2)
    v = torch.ones(keys, 2)
    out = torch.full_like(q, float("nan"))
    score = torch.empty(score_elements(keys, heads.group))
    segments = [Segment(keys - 1, keys, 0, keys)]
    attention_forward(q, k, v, heads, segments, out=out, score=score)
    assert out[-1].eq(1).all()


def test_keys_outside_the_window_are_not_multiplied() -> None:
    """Products grow with T times the window, not with T^2."""
    heads, tokens = Heads(2, 1, 4, window=32), 2048
    tiles = list(_tiles(self_segments([tokens]), heads, score_elements(heads.reach(tokens), 2)))
    pairs = sum((t.q1 - t.q0) * (t.k1 - t.k0) for t in tiles)
    assert sum(t.q1 - t.q0 for t in tiles) == tokens
    assert max(t.k1 - t.k0 for t in tiles) <= heads.reach(tokens) == 96
    assert pairs <= 96 * tokens
