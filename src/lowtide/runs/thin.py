"""Long columns made short enough to draw, without losing what stands out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

POINTS = 320
"""Buckets that a chart's width is divided into."""


class Bucket(NamedTuple):
    """Values of neighbouring updates: where they lie, and what they are."""

    x: float
    mean: float
    low: float
    high: float


def buckets(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> list[Bucket]:
    """Neighbours summed up, at most `points` buckets of equally many.

    Args:
        x: ascending.
        y: as many; NaN is left out.
        points: how many buckets at most.

    Returns:
        Buckets in order of x. With few values each has one of its own.
    """
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if not math.isnan(b)]
    out = []
    for first, last in bounds(len(pairs), points):
        part = pairs[first:last]
        values = [b for _, b in part]
        middle = sum(a for a, _ in part) / len(part)
        out.append(Bucket(middle, sum(values) / len(values), min(values), max(values)))
    return out


def bounds(count: int, parts: int) -> list[tuple[int, int]]:
    """`count` things in at most `parts` runs of nearly equal length, as (first, after last)."""
    parts = min(count, parts)
    return [(count * n // parts, count * (n + 1) // parts) for n in range(parts)]


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Running means of at most `width` values around each."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half, count = width // 2, len(values)
    spans = [(max(0, n - half), min(count, n + half + 1)) for n in range(count)]
    return [(sums[b] - sums[a]) / (b - a) for a, b in spans]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`: multiples of 1, 2, 2.5 or 5 times a power of ten.

    Args:
        low: the least.
        high: the greatest, above `low`.
        about: how many are wanted.

    Returns:
        Ascending; at least one where the range holds a multiple.
    """
    rough = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]
