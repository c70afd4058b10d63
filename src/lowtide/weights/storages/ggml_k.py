"""The block storages of 256 columns: parts of a block have scales that are integers themselves.

Q4_K and Q5_K have eight parts of 32 columns, each with a scale and a minimum of six bits; Q6_K has
sixteen parts of 16 columns with a scale of eight bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ggml import BlockStorage, cut, half, nibbles


class Q4_K(BlockStorage):
    """d, dmin, 8 (scale, min), 128 bytes: w = (d scale) q - (dmin min).

    The low four bits of 32 bytes are one part, the high four the next.
    """

    name, number, size, nbytes, scratch = "Q4_K", 12, 256, 144, 288

    def unpack_(self, out: Tensor, blocks: Tensor) -> None:
        """See `BlockStorage.unpack_`."""
        parts = cut(out, 4, 2, 32).unbind(-2)
        for part, q in zip(parts, nibbles(cut(blocks[..., 16:], 4, 32)), strict=True):
            part.copy_(q)
        _scale_(out, blocks)


class Q5_K(BlockStorage):
    """As Q4_K, with 32 bytes of fifth bits between: bit g of byte j is column j of part g."""

    name, number, size, nbytes, scratch = "Q5_K", 13, 256, 176, 320

    def unpack_(self, out: Tensor, blocks: Tensor) -> None:
        """See `BlockStorage.unpack_`."""
        parts = cut(out, 4, 2, 32).unbind(-2)
        packed, fifth = nibbles(cut(blocks[..., 48:], 4, 32)), blocks[..., 16:48].contiguous()
        for odd, (part, q) in enumerate(zip(parts, packed, strict=True)):
            for pair in range(4):
                q[..., pair, :].bitwise_or_(_upper(fifth, 1, 2 * pair + odd))
            part.copy_(q)
        _scale_(out, blocks)


class Q6_K(BlockStorage):
    """128 bytes of four bits, 64 bytes of two, 16 scales, d: w = (d scale) (q - 32).

    Each half of a block is four runs of 32 columns: the low four bits of its 64 bytes, then the
    high four, and above them bits 0 and 1, 2 and 3, ... of its 32 bytes.
    """

    name, number, size, nbytes, scratch = "Q6_K", 14, 256, 210, 384

    def unpack_(self, out: Tensor, blocks: Tensor) -> None:
        """See `BlockStorage.unpack_`."""
        parts = cut(out, 2, 2, 2, 32).unbind(-3)
        upper = cut(blocks[..., 128:192], 2, 32).contiguous()
        packed = nibbles(cut(blocks[..., :128], 2, 2, 32))
        for high, (part, q) in enumerate(zip(parts, packed, strict=True)):
            for second in range(2):
                q[..., second, :].bitwise_or_(_upper(upper, 3, 4 * high + 2 * second))
            part.copy_(q.sub_(32).view(torch.int8))
        scales = blocks[..., 192:208].view(torch.int8).float().mul_(half(blocks, 208))
        cut(out, 16, 16).mul_(scales.unsqueeze(-1))


def _upper(packed: Tensor, mask: int, shift: int) -> Tensor:
    """Bits `mask << shift` of each byte, moved to above the low four."""
    held = packed.bitwise_and(mask << shift)
    if shift < 4:
        return held.bitwise_left_shift_(4 - shift)
    return held.bitwise_right_shift_(shift - 4)


def _scale_(out: Tensor, blocks: Tensor) -> None:
    """Apply the scales and minima that Q4_K and Q5_K begin with.

    Of 12 bytes, the first four have scales 0 to 3 in six bits, the next four minima 0 to 3; the
    last four have the low four bits of scales 4 to 7 and, above them, of minima 4 to 7, whose
    upper two bits are the upper two of the first eight bytes.
    """
    first, second, rest = cut(blocks[..., 4:16], 3, 4).unbind(-2)
    parts = cut(out, 8, 32)
    upper = (first >> 2).bitwise_and_(48)
    scales = torch.cat([first & 63, upper.bitwise_or_(rest & 15)], -1)
    parts.mul_(scales.float().mul_(half(blocks, 0)).unsqueeze(-1))
    upper = (second >> 2).bitwise_and_(48)
    minima = torch.cat([second & 63, upper.bitwise_or_(rest >> 4)], -1)
    parts.sub_(minima.float().mul_(half(blocks, 2)).unsqueeze(-1))
