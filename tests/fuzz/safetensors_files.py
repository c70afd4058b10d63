"""safetensors files whose headers lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from mutate import broken, documents


class Parts:
    """Header and data of a good file."""

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        self.header: dict[str, Any] = json.loads(raw[8 : 8 + length])
        self.data = raw[8 + length :]


_LENGTHS = (0, 1, 7, 8, 2**20, 2**31, 2**63 - 1, 2**63, 2**64 - 1)
_DTYPES = ("F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "x")


@st.composite
def files(draw: st.DrawFn, good: Parts) -> bytes:
    """A file with a changed header: entries, offsets, shapes, its length, or the data's."""
    header: Any = json.loads(json.dumps(good.header))
    kind = draw(st.sampled_from(("any", "entry", "entry", "name", "data", "length")))
    names = [name for name in header if name != "__metadata__"]
    name = draw(st.sampled_from(names))
    if kind == "any":
        header = draw(documents(header, ("__metadata__", *names[:2])))
    elif kind == "entry":
        entry = header[name]
        start, end = entry["data_offsets"]
        what = draw(st.sampled_from(("dtype", "shape", "offsets", "offsets", "other")))
        if what == "dtype":
            entry["dtype"] = draw(st.sampled_from(_DTYPES))
        elif what == "shape":
            entry["shape"] = draw(
                st.sampled_from(
                    (entry["shape"][::-1], [], [0], [2**63], [-1], [2**32, 2**32], [1] * 99)
                )
            )
        elif what == "offsets":
            moved = draw(st.sampled_from((1, -1, 4, -4, 2**40, -(2**40), 2**63)))
            entry["data_offsets"] = draw(
                st.sampled_from(
                    ([start + moved, end + moved], [start, end + moved], [end, start], [0, end])
                )
            )
        else:
            header[name] = draw(documents(entry))
    elif kind == "name":
        header[draw(st.sampled_from((name + "x", "", "\ud800", "../x", "a" * 9999)))] = header.pop(
            name
        )
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text = draw(broken(text))
    length = draw(st.sampled_from(_LENGTHS)) if kind == "length" else len(text)
    data = good.data
    if kind == "data":
        cut = draw(st.integers(0, len(data)))
        data = data[:cut] + draw(st.sampled_from((b"", b"\x00" * 64, b"\xff" * 9)))
    return struct.pack("<Q", length) + text + data
