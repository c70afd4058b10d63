"""Causal attention of whole sequences by PyTorch's fused CPU kernel, some heads at a time.

The same function as the tiles of `ops.attention`, from one call per sequence and few heads instead
of some 25 calls per tile: 2 to 7 times faster on two cores. The kernel
(`aten::_scaled_dot_product_flash_attention_for_cpu`, the one behind `scaled_dot_product_attention`)
and its backward are plain functions of tensors; they allocate their results, so heads are taken few
at a time. Each head is computed by itself: how many go together changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

_FEWEST_HEADS = 4


@cache
def available(dtype: torch.dtype) -> bool:
    """Whether this build of torch has the kernel, with shared key/value heads.

    Args:
        dtype: of the computation.

    Returns:
        False on builds whose kernel is missing or wants keys and values repeated.
    """
    q, k = torch.zeros(1, 2, 2, 2, dtype=dtype), torch.zeros(1, 1, 2, 2, dtype=dtype)
    try:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, 0.0, True)
        found = _backward(q, q, k, k, o, lse, 1.0)
    except (AttributeError, RuntimeError):
        return False
    return all(g.shape == t.shape for g, t in zip(found, (q, k, k), strict=True))


def _chunks(num_kv: int, group: int) -> Iterator[tuple[int, int]]:
    """Key/value heads `[h0, h1)` that go together: query heads enough for every thread."""
    step = max(1, -(-max(_FEWEST_HEADS, torch.get_num_threads()) // group))
    for h0 in range(0, num_kv, step):
        yield h0, min(h0 + step, num_kv)


def elements(length: int, num: int, num_kv: int, dim: int, *, backward: bool) -> int:
    """Elements allocated at most for a sequence of `length` tokens.

    Args:
        length: tokens of the longest sequence.
        num: query heads.
        num_kv: key/value heads.
        dim: of a head.
        backward: whether gradients are formed.

    Returns:
        The output of some heads, or the gradients of their q, k and v; and the kernel's own
        buffers of scores per thread.
    """
    group = num // num_kv
    most = max(h1 - h0 for h0, h1 in _chunks(num_kv, group))
    rows = 256 if length >= 768 else 64 if length >= 192 else 32  # the kernel's tiles of queries
    scores = torch.get_num_threads() * min(rows, length) * (min(512, length) + dim)
    if backward:
        return length * most * (group + 2) * dim + 2 * scores
    return length * most * group * dim + scores


def _per_head(x: Tensor, start: int, stop: int, dim: int) -> Tensor:
    """Rows `[start, stop)` of `(T, heads * dim)` as a `(1, heads, rows, dim)` view."""
    return x[start:stop].view(stop - start, -1, dim).transpose(0, 1).unsqueeze(0)


def fused_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dim: int,
    spans: Sequence[tuple[int, int]],
    *,
    out: Tensor,
    scale: float,
) -> Tensor:
    """Attend, sequence by sequence, each query to the keys at and before its position.

    Args:
        q: `(T, num * dim)`.
        k: `(T, num_kv * dim)`.
        v: `(T, num_kv * dim)`.
        dim: of a head.
        spans: rows `[start, stop)` of each sequence.
        out: `(T, num * dim)`, overwritten; must not overlap `q`.
        scale: of the scores.

    Returns:
        `lse (T, num)`.
    """
    num_kv = k.shape[1] // dim
    group = q.shape[1] // k.shape[1]
    lse = q.new_empty(q.shape[0], num_kv * group)
    for start, stop in spans:
        q_i, k_i, v_i, o_i = (_per_head(t, start, stop, dim) for t in (q, k, v, out))
        for h0, h1 in _chunks(num_kv, group):
            some, own = slice(h0 * group, h1 * group), slice(h0, h1)
            o, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_i[:, some], k_i[:, own], v_i[:, own], 0.0, True, scale=scale
            )
            o_i[:, some].copy_(o)
            lse[start:stop, some].copy_(sums[0].t())
    return lse


def fused_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dim: int,
    spans: Sequence[tuple[int, int]],
    *,
    dk: Tensor,
    dv: Tensor,
    scale: float,
) -> None:
    """Turn `q` into dq in place and overwrite `dk` and `dv`; the rest is left as it was.

    Args:
        do: `(T, num * dim)`, gradient of the output.
        q: `(T, num * dim)`, overwritten with its gradient.
        k: `(T, num_kv * dim)`.
        v: `(T, num_kv * dim)`.
        o: `(T, num * dim)`, the forward's output.
        lse: `(T, num)` from the forward.
        dim: of a head.
        spans: rows `[start, stop)` of each sequence.
        dk: `(T, num_kv * dim)`, overwritten.
        dv: `(T, num_kv * dim)`, overwritten.
        scale: of the scores.
    """
    num_kv = k.shape[1] // dim
    group = q.shape[1] // k.shape[1]
    for start, stop in spans:
        parts = [_per_head(t, start, stop, dim) for t in (do, q, k, v, o, dk, dv)]
        do_i, q_i, k_i, v_i, o_i, dk_i, dv_i = parts
        sums = lse[start:stop].t().unsqueeze(0)
        for h0, h1 in _chunks(num_kv, group):
            some, own = slice(h0 * group, h1 * group), slice(h0, h1)
            found = _backward(
                do_i[:, some], q_i[:, some], k_i[:, own], v_i[:, own], o_i[:, some],
                sums[:, some], scale,
            )  # fmt: skip
            q_i[:, some].copy_(found[0])
            dk_i[:, own].copy_(found[1])
            dv_i[:, own].copy_(found[2])


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, True, scale=scale
        )
    )
    return found
