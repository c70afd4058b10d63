"""Rotary position embedding (arXiv 2104.09864) in the half-split layout of Hugging Face.

Per head, with `x = [x1, x2]` split in the middle: `x1' = x1 cos - x2 sin`, `x2' = x2 cos + x1 sin`.
A rotation's transpose is the rotation by the negated angle, so the backward is the forward with the
sine negated, and nothing is saved. Tables may carry a common factor, which the transpose carries
too. Where they are narrower than half a head, the rest of each head stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    scratch: Tensor,
    inverse: bool = False,
    *,
    head_dim: int | None = None,
) -> None:
    """Rotate every head of `x` in place; with `inverse`, apply the backward instead.

    Args:
        x: `(T, heads * head_dim)`, overwritten.
        cos: `(T, rotated / 2)`, where `rotated` columns of each head are.
        sin: `(T, rotated / 2)`.
        scratch: flat, at least half the rotated elements of `x`, overwritten.
        inverse: negate the sine, which turns the forward into the backward.
        head_dim: columns of a head; None where all of them are rotated.
    """
    half = cos.shape[1]
    per_head = x.view(x.shape[0], -1, head_dim or 2 * half)
    x1, x2 = per_head[:, :, :half], per_head[:, :, half : 2 * half]
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    sign = -1.0 if inverse else 1.0
    x1_sin = scratch[: x1.numel()].view(x1.shape)
    torch.mul(x1, s, out=x1_sin)
    x1.mul_(c).addcmul_(x2, s, value=-sign)
    x2.mul_(c).add_(x1_sin, alpha=sign)
