"""8-bit integers, symmetric, with one scale per output channel (row).

scale = max |w| / 127, rounded to bfloat16      q = round(w / scale)      w ~ q scale
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Parts

_LARGEST = 127


@dataclass(frozen=True)
class Int8:
    """`int8 (out, in)` and `scales (out, 1)`: 1 byte per weight and 2 per row."""

    name: str

    def entries(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """See `Storage.entries`."""
        return {"int8": (torch.int8, shape), "scales": (torch.bfloat16, (shape[0], 1))}

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        """See `Storage.encode`. Errors are at most half a scale."""
        scales = rows.abs().amax(1, keepdim=True).div_(_LARGEST).bfloat16()
        quotient = rows / divisor(scales)
        return {"int8": quotient.round_().clamp_(-_LARGEST, _LARGEST).char(), "scales": scales}

    def scratch_bytes(self, rows: int, span: tuple[int, int], cols: int, itemsize: int) -> int:
        """See `Storage.scratch_bytes`: the scales, widened."""
        return rows * itemsize

    def decode_(
        self, out: Tensor, parts: Parts, rows: slice | Tensor, span: tuple[int, int]
    ) -> None:
        """See `Storage.decode_`."""
        out.copy_(parts["int8"][rows, span[0] : span[1]]).mul_(parts["scales"][rows])


def divisor(scales: Tensor) -> Tensor:
    """Scales in float32 to divide by: 1 where a scale is 0, as all its weights then are."""
    wide = scales.float()
    return wide.masked_fill_(wide == 0, 1.0)
