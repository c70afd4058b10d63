"""Weights as GGUF files hold them: rows of blocks, each with its own scales beside its integers.

A block is a few bytes of scales and then the integers of `size` columns. Its bytes are unpacked
where they lie: an operation on bytes for what is packed, a widening copy into the caller's tile,
then the scales. Sums and products are those of ggml's reference in float32, in its order, so that
a weight is the same to the bit here, in llama.cpp and in the `gguf` package.

Formulas are those of `dequantize_row_*` in ggml's ggml-quants.c.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from .base import Parts
from .int4 import group_runs


class BlockStorage(ABC):
    """`blocks (out, bytes of a row)`. Read only: files are made by llama.cpp's tools.

    Attributes:
        name: as llama.cpp calls it.
        number: in a file.
        size: columns of a block.
        nbytes: bytes of a block.
        scratch: bytes that unpacking one block takes beside its weights.
    """

    name: ClassVar[str]
    number: ClassVar[int]
    size: ClassVar[int]
    nbytes: ClassVar[int]
    scratch: ClassVar[int]

    @abstractmethod
    def unpack_(self, out: Tensor, blocks: Tensor) -> None:
        """`out (n, k, size)`, float32, of `blocks (n, k, nbytes)`, bytes."""

    def scratch_bytes(self, rows: int, span: tuple[int, int], cols: int, itemsize: int) -> int:
        """See `Storage.scratch_bytes`: a block's own, and weights that are first unpacked apart."""
        most = 0
        for start, stop in group_runs(*span, self.size):
            blocks = rows * (-(-stop // self.size) - start // self.size)
            apart = itemsize != 4 or (stop - start) % self.size > 0
            most = max(most, blocks * (self.scratch + (4 * self.size if apart else 0)))
        return most

    def decode_(
        self, out: Tensor, parts: Parts, rows: slice | Tensor, span: tuple[int, int]
    ) -> None:
        """See `Storage.decode_`."""
        held = parts["blocks"]
        held = held[rows] if isinstance(rows, slice) else held.index_select(0, rows)
        blocks = cut(held, -1, self.nbytes)
        for start, stop in group_runs(*span, self.size):
            first, last = start // self.size, -(-stop // self.size)
            run = out[:, start - span[0] : stop - span[0]]
            if out.dtype == torch.float32 and (last - first) * self.size == stop - start:
                self.unpack_(cut(run, -1, self.size), blocks[:, first:last])
                continue
            whole = torch.empty(len(out), last - first, self.size)
            self.unpack_(whole, blocks[:, first:last])
            run.copy_(whole.flatten(1)[:, start - first * self.size : stop - first * self.size])


def cut(tensor: Tensor, *sizes: int) -> Tensor:
    """A view with the last dimension cut into several."""
    return tensor.view(*tensor.shape[:-1], *sizes)


def half(blocks: Tensor, at: int) -> Tensor:
    """The float16 number at a byte of each block, as float32: `(n, k, 1)`."""
    return blocks[..., at : at + 2].view(torch.float16).float()


def nibbles(packed: Tensor) -> Iterator[Tensor]:
    """The low four bits of each byte, then the high four, to be changed at will.

    Copied together first: an operation on bytes with gaps between takes many times as long.
    """
    held = packed.clone(memory_format=torch.contiguous_format)
    yield held & 15
    yield held.bitwise_right_shift_(4)


class Q8_0(BlockStorage):
    """d (float16), 32 signed bytes: w = d q."""

    name, number, size, nbytes, scratch = "Q8_0", 8, 32, 34, 4

    def unpack_(self, out: Tensor, blocks: Tensor) -> None:
        """See `BlockStorage.unpack_`."""
        out.copy_(blocks[..., 2:].view(torch.int8)).mul_(half(blocks, 0))


class Q4_0(BlockStorage):
    """d, 16 bytes: w = d (q - 8). Columns 0 to 15 are the low four bits, 16 to 31 the high."""

    name, number, size, nbytes, scratch = "Q4_0", 2, 32, 18, 32

    def unpack_(self, out: Tensor, blocks: Tensor) -> None:
        """See `BlockStorage.unpack_`."""
        for run, q in zip(out.chunk(2, -1), nibbles(blocks[..., 2:]), strict=True):
            run.copy_(q.sub_(8).view(torch.int8))
        out.mul_(half(blocks, 0))


class Q4_1(BlockStorage):
    """d, m, bytes as in Q4_0: w = d q + m."""

    name, number, size, nbytes, scratch = "Q4_1", 3, 32, 20, 32

    def unpack_(self, out: Tensor, blocks: Tensor) -> None:
        """See `BlockStorage.unpack_`."""
        for run, q in zip(out.chunk(2, -1), nibbles(blocks[..., 4:]), strict=True):
            run.copy_(q)
        out.mul_(half(blocks, 0)).add_(half(blocks, 2))


class Q5_0(BlockStorage):
    """d, 32 fifth bits, bytes as in Q4_0: w = d (q - 16)."""

    name, number, size, nbytes, scratch = "Q5_0", 6, 32, 22, 64

    def unpack_(self, out: Tensor, blocks: Tensor) -> None:
        """See `BlockStorage.unpack_`."""
        fifth = blocks[..., 2:6].chunk(2, -1)
        runs = zip(out.chunk(2, -1), nibbles(blocks[..., 6:]), fifth, strict=True)
        for run, q, bits in runs:
            run.copy_(q.bitwise_or_(_fifth_bits(bits)).sub_(16).view(torch.int8))
        out.mul_(half(blocks, 0))


class Q5_1(BlockStorage):
    """d, m, 32 fifth bits, bytes as in Q4_0: w = d q + m."""

    name, number, size, nbytes, scratch = "Q5_1", 7, 32, 24, 64

    def unpack_(self, out: Tensor, blocks: Tensor) -> None:
        """See `BlockStorage.unpack_`."""
        fifth = blocks[..., 4:8].chunk(2, -1)
        runs = zip(out.chunk(2, -1), nibbles(blocks[..., 8:]), fifth, strict=True)
        for run, q, bits in runs:
            run.copy_(q.bitwise_or_(_fifth_bits(bits)))
        out.mul_(half(blocks, 0)).add_(half(blocks, 2))


def _fifth_bits(packed: Tensor) -> Tensor:
    """16 where a column's bit is set, `(n, k, 16)`, of `(n, k, 2)` bytes with eight bits each."""
    spread = _SPREAD.index_select(0, packed.int().flatten())
    return spread.view(torch.uint8).view(*packed.shape[:2], 16)


def _spread_bits() -> Tensor:
    """Eight bytes for each byte, which hold 16 where its bits are set, as one integer."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return (16 * bits).to(torch.uint8).view(torch.int64).flatten()


_SPREAD = _spread_bits()
