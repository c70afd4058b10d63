"""Tables of rotary angles.

Angles are formed in float32 whatever the compute dtype, as transformers does: that rounding is part
of the function that the weights were trained with, and at long positions it is the largest
difference that a choice here could make.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """`(head_dim / 2,)` float32 radians per position, after any rescaling."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    freq = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return freq / rope.factor
    if rope.kind == "llama3":
        return _llama3(freq, rope)
    return freq


def _llama3(freq: Tensor, rope: RopeSpec) -> Tensor:
    """Llama 3.1's rule: keep short wavelengths, stretch long ones, interpolate between."""
    wavelength = 2 * math.pi / freq
    turns = rope.original_max_positions / wavelength
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - ramp) * freq / rope.factor + ramp * freq
    low = wavelength > rope.original_max_positions / rope.low_freq_factor
    high = wavelength < rope.original_max_positions / rope.high_freq_factor
    return torch.where(low, freq / rope.factor, torch.where(high, freq, between))


def rope_tables(
    rope: RopeSpec, head_dim: int, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position.

    Args:
        rope: base and scaling.
        head_dim: even.
        positions: `(T,)` int64, counted from 0 in each sequence.
        dtype: the compute dtype of the result.

    Returns:
        cos and sin, each `(T, head_dim / 2)`.
    """
    angles = positions.float().unsqueeze(1) * inverse_frequencies(rope, head_dim).unsqueeze(0)
    return angles.cos().to(dtype), angles.sin().to(dtype)
