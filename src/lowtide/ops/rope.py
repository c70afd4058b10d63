"""Rotary position embedding (arXiv 2104.09864) in the half-split layout of Hugging Face.

Per head, with `x = [x1, x2]` split in the middle: `x1' = x1 cos - x2 sin`, `x2' = x2 cos + x1 sin`.
A rotation's transpose is the rotation by the negated angle, so the backward is the forward with the
sine negated, and nothing is saved.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_(x: Tensor, cos: Tensor, sin: Tensor, scratch: Tensor, inverse: bool = False) -> None:
    """Rotate every head of `x` in place; with `inverse`, apply the backward instead.

    Args:
        x: `(T, heads * head_dim)`, overwritten.
        cos: `(T, head_dim / 2)`.
        sin: `(T, head_dim / 2)`.
        scratch: flat, at least half the elements of `x`, overwritten.
        inverse: negate the sine, which turns the forward into the backward.
    """
    tokens, width = x.shape
    half = cos.shape[1]
    heads = width // (2 * half)
    pairs = x.view(tokens, heads, 2, half)
    x1, x2 = pairs[:, :, 0], pairs[:, :, 1]
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    sign = -1.0 if inverse else 1.0
    x1_sin = scratch[: x1.numel()].view(x1.shape)
    torch.mul(x1, s, out=x1_sin)
    x1.mul_(c).addcmul_(x2, s, value=-sign)
    x2.mul_(c).add_(x1_sin, alpha=sign)
