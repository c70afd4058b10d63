"""Dropout whose mask is a pure function of (seed, row, column), so that a recompute sees it again.

A counter-based hash decides each element; there is no generator state to save or replay, a tile of
columns has the same mask as the same columns of the whole, and every method that is given the same
seed drops the same elements. Inverted scaling: what is kept is divided by `1 - p`, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_ROW_STEP, _COL_STEP = 0x1E3779B9, 0x5BD1E995
_MIX_1, _MIX_2 = 0x2C1B3C6D, 0x297A2D39
_MASK_31 = 0x7FFFFFFF
_DRAWN_ELEMENTS = 1 << 15
DRAW_BYTES = 4 * 8 * _DRAWN_ELEMENTS
"""What a draw takes: keys, bits, bits shifted, and the bits before them."""


def dropout_scale(x: Tensor, p: float, seed: int, first_col: int = 0, first_row: int = 0) -> Tensor:
    """The factors that dropout multiplies by: `1 / (1 - p)` where kept, 0 where dropped.

    Args:
        x: `(T, C)`, for its shape, dtype and device.
        p: probability that an element is dropped, `0 <= p < 1`.
        seed: any integer; one per module and step.
        first_col: the column of the whole activation at which this tile begins.
        first_row: its first row.

    Returns:
        `(T, C)` in the dtype of `x`; what the draw takes beside it does not grow with T.
    """
    scale = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start, stop, bits in _random_bits(x, seed, first_row, first_col):
        scale[start:stop] = bits >= int(p * (_MASK_31 + 1))
    return scale.mul_(1.0 / (1.0 - p))


def add_uniform_(x: Tensor, bound: float, seed: int, first_row: int = 0) -> None:
    """`x += u`, u uniform in `[-bound, bound)`, by the same hash.

    Args:
        x: `(T, C)`.
        bound: of the noise.
        seed: any integer.
        first_row: the row of the whole activation at which this part begins.
    """
    for start, stop, bits in _random_bits(x, seed, first_row, 0):
        x[start:stop] += bits.to(x.dtype).mul_(2 * bound / (_MASK_31 + 1)).sub_(bound)


def _random_bits(
    x: Tensor, seed: int, first_row: int, first_col: int
) -> Iterator[tuple[int, int, Tensor]]:
    """31 bits for each element of `x`, some rows at a time, as (first row, last, int64)."""
    rows = torch.arange(first_row, first_row + x.shape[0], dtype=torch.int64, device=x.device)
    cols = torch.arange(first_col, first_col + x.shape[1], dtype=torch.int64, device=x.device)
    row_key = _mix(rows * _ROW_STEP + (seed & _MASK_31))
    col_key = _mix(cols * _COL_STEP + ((seed >> 31) & _MASK_31))
    for start, stop in row_spans(x.shape[0], x.shape[1]):
        yield start, stop, _mix(row_key[start:stop].unsqueeze(1) * 3 + col_key.unsqueeze(0))


def row_spans(rows: int, columns: int) -> list[tuple[int, int]]:
    """`[0, rows)` in spans of some 32,000 elements."""
    step = max(1, _DRAWN_ELEMENTS // max(1, columns))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _mix(value: Tensor) -> Tensor:
    """An integer finaliser (multiply and xor-shift) on the low 31 bits of int64 values."""
    value = value & _MASK_31
    value.bitwise_xor_(value >> 15).mul_(_MIX_1).bitwise_and_(_MASK_31)
    value.bitwise_xor_(value >> 12).mul_(_MIX_2).bitwise_and_(_MASK_31)
    return value.bitwise_xor_(value >> 15)
