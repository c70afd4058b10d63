"""Dropout whose mask is a pure function of (seed, row, column), so that a recompute sees it again.

A counter-based hash decides each element; there is no generator state to save or replay, a tile of
columns has the same mask as the same columns of the whole, and every method that is given the same
seed drops the same elements. Inverted scaling: what is kept is divided by `1 - p`, as in PEFT.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROW_STEP, _COL_STEP = 0x1E3779B9, 0x5BD1E995
_MIX_1, _MIX_2 = 0x2C1B3C6D, 0x297A2D39
_MASK_31 = 0x7FFFFFFF


def dropout_scale(x: Tensor, p: float, seed: int, first_col: int = 0) -> Tensor:
    """The factors that dropout multiplies by: `1 / (1 - p)` where kept, 0 where dropped.

    Args:
        x: `(T, C)`, for its shape, dtype and device.
        p: probability that an element is dropped, `0 <= p < 1`.
        seed: any integer; one per module and step.
        first_col: the column of the whole activation at which this tile begins.

    Returns:
        `(T, C)` in the dtype of `x`.
    """
    rows = torch.arange(x.shape[0], dtype=torch.int64, device=x.device)
    cols = torch.arange(first_col, first_col + x.shape[1], dtype=torch.int64, device=x.device)
    row_key = _mix(rows * _ROW_STEP + (seed & _MASK_31))
    col_key = _mix(cols * _COL_STEP + ((seed >> 31) & _MASK_31))
    bits = _mix(row_key.unsqueeze(1) * 3 + col_key.unsqueeze(0))
    keep = bits >= int(p * (_MASK_31 + 1))
    return keep.to(x.dtype).mul_(1.0 / (1.0 - p))


def _mix(value: Tensor) -> Tensor:
    """An integer finaliser (multiply and xor-shift) on the low 31 bits of int64 values."""
    value = value & _MASK_31
    value = ((value ^ (value >> 15)) * _MIX_1) & _MASK_31
    value = ((value ^ (value >> 12)) * _MIX_2) & _MASK_31
    return value ^ (value >> 15)
