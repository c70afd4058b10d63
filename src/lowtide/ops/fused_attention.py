"""Causal attention of whole sequences by PyTorch's fused CPU kernel, some heads at a time.

The same function as the tiles of `ops.attention`, from one call per sequence and few heads instead
of some 25 calls per tile: 2 to 7 times faster on two cores. The kernel
(`aten::_scaled_dot_product_flash_attention_for_cpu`, the one behind `scaled_dot_product_attention`)
and its backward are plain functions of tensors; they allocate their results, so heads are taken few
at a time, and those that share keys and values get them repeated by a view. How many go together
changes no bit where heads are whole vector registers wide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

_FEWEST_HEADS = 2


@cache
def available(dtype: torch.dtype) -> bool:
    """Whether this build of torch has the kernel.

    Args:
        dtype: of the computation.

    Returns:
        False where the tiles of `ops.attention` are used.
    """
    q = torch.zeros(1, 1, 2, 2, dtype=dtype, device="cpu")
    try:
        o, lse = _forward(q, q, q, 1.0)
        _backward(q, q, q, q, o, lse, 1.0)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True


class _Heads(NamedTuple):
    """Query heads `[q0, q1)` and the key/value heads `[h0, h1)` that they share."""

    q0: int
    q1: int
    h0: int
    h1: int


def _chunks(num_kv: int, group: int) -> Iterator[_Heads]:
    """Heads that go together: some of one group, or whole groups; enough for every thread."""
    wanted = max(_FEWEST_HEADS, torch.get_num_threads())
    if wanted < group:
        for h in range(num_kv):
            for q0 in range(h * group, (h + 1) * group, wanted):
                yield _Heads(q0, min(q0 + wanted, (h + 1) * group), h, h + 1)
        return
    step = -(-wanted // group)
    for h0 in range(0, num_kv, step):
        h1 = min(h0 + step, num_kv)
        yield _Heads(h0 * group, h1 * group, h0, h1)


def _repeated(x: Tensor, some: _Heads) -> Tensor:
    """Key/value heads `(1, heads, T, dim)` for each query head; a view where they are one."""
    each = (some.q1 - some.q0) // (some.h1 - some.h0)
    own = x[:, some.h0 : some.h1].unsqueeze(2)
    return own.expand(-1, -1, each, -1, -1).reshape(1, -1, *x.shape[2:])


def _add_per_head(into: Tensor, grad: Tensor, some: _Heads) -> None:
    """Add the gradient of `_repeated`, head after head: the order does not depend on chunks."""
    each = (some.q1 - some.q0) // (some.h1 - some.h0)
    for head, one in enumerate(grad[0]):
        into[0, some.h0 + head // each].add_(one)


def _split_scale(scale: float) -> tuple[float, float]:
    """A factor for q and a power of two for the kernel, whose product is the scale.

    The kernel scales scores before rounding in its backward and after it in its forward: unless
    that is exact, gradients of peaked scores are several times as far off.
    """
    mantissa, exponent = math.frexp(scale)
    return 2.0 * mantissa, 2.0 ** (exponent - 1)


def _scaled(q: Tensor, factor: float) -> Tensor:
    """`q` times the factor; itself where that is 1, as for heads of 16 or 64."""
    return q if factor == 1.0 else q * factor


def elements(length: int, num: int, num_kv: int, dim: int, *, backward: bool) -> int:
    """Elements allocated at most for a sequence of `length` tokens.

    Args:
        length: tokens of the longest sequence.
        num: query heads.
        num_kv: key/value heads.
        dim: of a head.
        backward: whether gradients are formed.

    Returns:
        The scaled q of some heads and their output, or the gradients of their q, k and v; and the
        kernel's own buffers of scores per thread.
    """
    chunks = list(_chunks(num_kv, num // num_kv))
    most = max(some.q1 - some.q0 for some in chunks)
    repeated = 2 * most if any(some.h1 - some.h0 > 1 for some in chunks) else 0
    rows = 256 if length >= 768 else 64 if length >= 192 else 32  # the kernel's tiles of queries
    scores = torch.get_num_threads() * min(rows, length) * (min(512, length) + dim)
    if backward:
        return length * (4 * most + repeated) * dim + 2 * scores
    return length * (2 * most + repeated) * dim + scores


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
    factor, power = _split_scale(scale)
    lse = q.new_empty(q.shape[0], num_kv * group)
    for start, stop in spans:
        q_i, k_i, v_i, o_i = (_per_head(t, start, stop, dim) for t in (q, k, v, out))
        for some in _chunks(num_kv, group):
            heads = slice(some.q0, some.q1)
            o, sums = _forward(
                _scaled(q_i[:, heads], factor), _repeated(k_i, some), _repeated(v_i, some), power
            )
            o_i[:, heads].copy_(o)
            lse[start:stop, heads].copy_(sums[0].t())
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
    factor, power = _split_scale(scale)
    dk.zero_()
    dv.zero_()
    for start, stop in spans:
        parts = [_per_head(t, start, stop, dim) for t in (do, q, k, v, o, dk, dv)]
        do_i, q_i, k_i, v_i, o_i, dk_i, dv_i = parts
        sums = lse[start:stop].t().unsqueeze(0)
        for some in _chunks(num_kv, group):
            heads = slice(some.q0, some.q1)
            found = _backward(
                do_i[:, heads], _scaled(q_i[:, heads], factor), _repeated(k_i, some),
                _repeated(v_i, some), o_i[:, heads], sums[:, heads], power,
            )  # fmt: skip
            torch.mul(found[0], factor, out=q_i[:, heads])
            _add_per_head(dk_i, found[1], some)
            _add_per_head(dv_i, found[2], some)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, True, scale=scale
    )
    return found


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, True, scale=scale
        )
    )
    return found
