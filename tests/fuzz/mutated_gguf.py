"""GGUF files changed where it hurts: counts, lengths, types, dimensions, offsets, and any byte.

What a header says lies at places that are found once in a good file; a mutation writes another
number there. Some bytes anywhere are changed, cut out or put in as well.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import gguf
from hypothesis import strategies as st

_NUMBERS = (
    *(0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 14, 16, 30, 31, 32, 33, 39, 64, 255, 256, 2**16),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1),
)


class Good(NamedTuple):
    """A good file, and where its header has numbers: offset and bytes."""

    raw: bytes
    places: list[tuple[int, int]]

    @classmethod
    def read(cls, path: Path) -> Good:
        """Find them."""
        reader = gguf.GGUFReader(path)
        places = [(4, 4), (8, 8), (16, 8)]
        for field in reader.fields.values():
            if field.offset < 24:
                continue
            at = field.offset
            for part in field.parts:
                if part.dtype.itemsize >= 4 and part.nbytes == part.dtype.itemsize:
                    places.append((at, part.nbytes))
                at += part.nbytes
        for tensor in reader.tensors:
            at = tensor.field.offset
            for part in tensor.field.parts:
                if part.dtype.itemsize >= 4:
                    size = part.dtype.itemsize
                    places += [(at + size * i, size) for i in range(len(part))]
                at += part.nbytes
        return cls(path.read_bytes(), places)


@st.composite
def files(draw: st.DrawFn, good: Good) -> bytes:
    """A good file with some of it changed."""
    raw = bytearray(good.raw)
    for _ in range(draw(st.integers(0, 2))):
        at, size = draw(st.sampled_from(good.places))
        number = draw(st.sampled_from(_NUMBERS)) % (1 << 8 * size)
        raw[at : at + size] = struct.pack("<I" if size == 4 else "<Q", number)
    header = good.places[-1][0]
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2)))):
        at = draw(st.integers(0, header))
        how = draw(st.sampled_from(("flip", "cut", "insert")))
        if how == "flip":
            raw[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del raw[at : at + draw(st.integers(1, 40))]
        else:
            raw[at:at] = draw(st.binary(min_size=1, max_size=20))
    if draw(st.integers(0, 5)) == 0:
        del raw[draw(st.integers(0, len(raw) - 1)) :]
    return bytes(raw)
