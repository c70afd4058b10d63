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


def inverse_frequencies(rope: RopeSpec, head_dim: int, *, long: bool = False) -> Tensor:
    """`(rotated / 2,)` float32 radians per position, after any rescaling, on the CPU.

    Args:
        rope: base and scaling.
        head_dim: columns of a head, of which `rope.rotated` are rotated.
        long: whether the sequence is longer than `rope.original_max_positions`.

    Returns:
        Frequencies.
    """
    columns = rope.rotated or head_dim
    exponent = torch.arange(0, columns, 2, dtype=torch.int64, device="cpu").float() / columns
    if rope.kind == "longrope":
        factors = rope.long_factors if long else rope.short_factors
        divisors = torch.tensor(factors, dtype=torch.float32, device="cpu")
        return 1.0 / (divisors * rope.theta**exponent)
    freq = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return freq / rope.factor
    if rope.kind == "banded":
        return _banded(freq, rope)
    if rope.kind == "yarn":
        start, stop = rope.ramp
        places = torch.arange(columns // 2, dtype=torch.float32, device="cpu") - start
        kept = 1 - (places / (stop - start if stop != start else 0.001)).clamp(0, 1)
        return 1.0 / (rope.factor * rope.theta**exponent) * (1 - kept) + freq * kept
    return freq


def _banded(freq: Tensor, rope: RopeSpec) -> Tensor:
    """Keep short wavelengths, stretch long ones, interpolate between (Llama 3.1's rule)."""
    wavelength = 2 * math.pi / freq
    turns = rope.original_max_positions / wavelength
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - ramp) * freq / rope.factor + ramp * freq
    low = wavelength > rope.original_max_positions / rope.low_freq_factor
    high = wavelength < rope.original_max_positions / rope.high_freq_factor
    return torch.where(low, freq / rope.factor, torch.where(high, freq, between))


def rope_tables(
    rope: RopeSpec,
    head_dim: int,
    positions: Tensor,
    dtype: torch.dtype,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position.

    Args:
        rope: base and scaling.
        head_dim: even.
        positions: `(T,)` int64, counted from 0 in each sequence.
        dtype: the compute dtype of the result.
        lengths: `(T,)`, tokens of the sequence of each position, where angles depend on it.

    Returns:
        cos and sin, each `(T, rotated / 2)`.
    """
    freq = inverse_frequencies(rope, head_dim).to(positions.device)
    if rope.depends_on_length and lengths is not None:
        is_long = (lengths > rope.original_max_positions).unsqueeze(1)
        other = inverse_frequencies(rope, head_dim, long=True).to(positions.device)
        freq = torch.where(is_long, other, freq)
    angles = positions.float().unsqueeze(1) * freq
    cos, sin = angles.cos(), angles.sin()
    if rope.table_factor != 1.0:
        cos, sin = cos.mul_(rope.table_factor), sin.mul_(rope.table_factor)
    return cos.to(dtype), sin.to(dtype)
