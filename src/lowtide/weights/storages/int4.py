"""4-bit integers with one scale, and perhaps one zero point, per group of columns of a row.

    symmetric     scale = m / -8 with m the group's weight of largest magnitude, its sign kept
                  q = round(w / scale) in [-8, 7]                       w ~ q scale
    asymmetric    scale = (max - min) / 15 over the group and 0     zero = round(-min / scale) - 8
                  q = round(w / scale) + zero in [-8, 7]                w ~ (q - zero) scale

With m at -8 all 16 levels are used and m itself is kept (llama.cpp's Q4_0 does the same). Scales
are rounded to bfloat16 before anything is divided by them.

**Packing.** A row is cut into two halves of whole groups: byte j holds column j in its low four
bits and column `half + j` in its high four. Unpacking a half is then one operation on bytes that
lie side by side, which leaves `16 q` as a signed byte (the low half is shifted up, the high half
is masked); the 16 is taken out of the scale, which is exact. A widening copy and one product with
the scales follow. The byte operation's result, an eighth of the tile's bytes in float32 (a
quarter, where the tile lies in one half), and the widened scales are all the memory that a tile
takes beside the caller's buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Parts
from .int8 import divisor

_LEAST, _MOST = -8, 7
_SHIFT = 16
"""What a nibble in the high half of a byte is multiplied by."""


@dataclass(frozen=True)
class Int4:
    """`int4 (out, half)` bytes, `scales` and, if asymmetric, `zeros`, `(out, groups)`.

    4.5 bits per weight in groups of 32 and 4.25 in groups of 64; zero points add 8 bits per group.
    """

    name: str
    group_size: int
    symmetric: bool = True

    def entries(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """See `Storage.entries`."""
        rows, cols = shape
        groups = -(-cols // self.group_size)
        entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "int4": (torch.int8, (rows, -(-groups // 2) * self.group_size)),
            "scales": (torch.bfloat16, (rows, groups)),
        }
        if not self.symmetric:
            entries["zeros"] = (torch.int8, (rows, groups))
        return entries

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        """See `Storage.encode`.

        Errors are at most half a scale; symmetric, they are at most one scale between 7 and 8
        scales opposite to the group's largest weight.
        """
        count, cols = rows.shape
        groups = -(-cols // self.group_size)
        # A last group that is not full is filled up with zeros, which change no scale.
        grouped = F.pad(rows, (0, groups * self.group_size - cols)).view(count, groups, -1)
        low, high = grouped.aminmax(dim=2, keepdim=True)
        parts: dict[str, Tensor] = {}
        if self.symmetric:
            scales = torch.where(-low > high, low, high).div_(_LEAST).bfloat16()
            q = grouped / divisor(scales)
        else:
            low, high = low.clamp_(max=0), high.clamp_(min=0)
            scales = ((high - low) / (_MOST - _LEAST)).bfloat16()
            zeros = (-low / divisor(scales)).round_().add_(_LEAST).clamp_(_LEAST, _MOST)
            q = (grouped / divisor(scales)).round_().add_(zeros)
            parts["zeros"] = zeros.char().squeeze(2)
        q = q.round_().clamp_(_LEAST, _MOST).char().view(count, -1)
        half = -(-groups // 2) * self.group_size
        first, second = q[:, :half], F.pad(q[:, half:], (0, 2 * half - q.shape[1]))
        packed = (first & 15).bitwise_or_(second << 4)
        return {"int4": packed, "scales": scales.squeeze(2), **parts}

    def scratch_bytes(self, rows: int, span: tuple[int, int], cols: int, itemsize: int) -> int:
        """See `Storage.scratch_bytes`: raised bytes, or the scales and zero points, widened."""
        half = -(-self._groups((0, cols)).stop // 2) * self.group_size
        groups = self._groups(span)
        scales = rows * (groups.stop - groups.start) * itemsize
        raised = rows * min(half, span[1] - span[0])
        return max(raised, scales * (1 if self.symmetric else 2))

    def decode_(
        self, out: Tensor, parts: Parts, rows: slice | Tensor, span: tuple[int, int]
    ) -> None:
        """See `Storage.decode_`."""
        self._unpack_(out, parts["int4"][rows], span)
        held = self._groups(span)
        scales = parts["scales"][rows][:, held].to(out.dtype).div_(_SHIFT).unsqueeze(2)
        zeros = None
        if not self.symmetric:
            zeros = parts["zeros"][rows][:, held].to(out.dtype).mul_(_SHIFT).unsqueeze(2)
        for start, stop in group_runs(*span, self.group_size):
            groups = self._groups((start, stop), held.start)
            run = out[:, start - span[0] : stop - span[0]]
            run = run.view(len(out), groups.stop - groups.start, -1)
            if zeros is not None:
                run.sub_(zeros[:, groups])
            run.mul_(scales[:, groups])

    def _groups(self, span: tuple[int, int], first: int = 0) -> slice[int, int, None]:
        """Groups that columns `span` lie in, counted from `first`."""
        return slice(span[0] // self.group_size - first, -(-span[1] // self.group_size) - first)

    def _unpack_(self, out: Tensor, packed: Tensor, span: tuple[int, int]) -> None:
        """`out = 16 q` of columns `span`."""
        half = packed.shape[1]
        raised = packed.new_empty(len(out) * min(half, span[1] - span[0]))
        for first in (0, half):
            start, stop = max(span[0], first), min(span[1], first + half)
            if start >= stop:
                continue
            held = packed[:, start - first : stop - first]
            q = raised[: held.numel()].view(held.shape)
            if first == 0:
                torch.bitwise_left_shift(held, 4, out=q)
            else:
                torch.bitwise_and(held, -_SHIFT, out=q)
            out[:, start - span[0] : stop - span[0]].copy_(q)


def group_runs(start: int, stop: int, group_size: int) -> list[tuple[int, int]]:
    """`[start, stop)` as a part of one group, whole groups, and a part of another."""
    first = min(stop, -(-start // group_size) * group_size)
    last = max(first, stop // group_size * group_size)
    return [run for run in ((start, first), (first, last), (last, stop)) if run[0] < run[1]]
