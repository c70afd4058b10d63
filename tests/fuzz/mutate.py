"""Documents changed where it hurts: types, sizes, names, nesting, bytes.

Each strategy starts from a document that is good and draws a few changes of its structure, then of
its text. hypothesis shrinks what fails to the change that matters.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, -(2**31) - 1, 2**53 + 1, 2**63, 2**64, 10**40),
    *(0.5, -0.0, 1e-320, 1e18, 1e308, math.nan, math.inf, -math.inf),
    *("", " ", "x", "0", "1e3", "none", "null", "true", "a\x00b", "\ud800", "\udfff\ud800", "é🌧"),
    *("../../x", "/etc/passwd", "~", "${HOME}", "a" * 5000, "\n" * 50, "{{ 1 }}", "%s%n", "\u202e"),
    *([], {}, [[]], [None], [1, "a"], {"": None}, {"a": {"b": []}}, [0] * 200, {"type": "x"}),
]
"""Values that belong nowhere, or only just."""
_DEEP = 3000


def odd_values() -> st.SearchStrategy[Any]:
    """One of ODD."""
    return st.sampled_from(ODD).map(copy.deepcopy)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:40])
        if isinstance(value, list)
        else ()
    )
    for key, child in children:
        yield from _places(child, (*path, key))


def _at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def _put(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    _at(document, path[:-1])[path[-1]] = value
    return document


@st.composite
def documents(draw: st.DrawFn, good: Any, names: tuple[str, ...] = ()) -> Any:
    """`good` with one to three changes; `names` are keys that its reader may know."""
    document = copy.deepcopy(good)
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        places = list(_places(document))
        path = places[draw(st.integers(0, len(places) - 1))]
        found = _at(document, path)
        kind = draw(st.sampled_from(("odd", "odd", "gone", "other", "tweak", "wrap", "add")))
        if kind == "odd" or (kind in ("gone", "add") and not path):
            document = _put(document, path, draw(odd_values()))
        elif kind == "gone":
            _at(document, path[:-1]).pop(path[-1])
        elif kind == "other":
            other = places[draw(st.integers(0, len(places) - 1))]
            document = _put(document, path, copy.deepcopy(_at(document, other)))
        elif kind == "wrap":
            document = _put(document, path, draw(st.sampled_from(([found], {"a": found}))))
        elif kind == "tweak":
            document = _put(document, path, draw(_tweaked(found)))
        else:
            holder = _at(document, path[:-1])
            if isinstance(holder, dict):
                key = draw(st.sampled_from((*names, "x", "", "\ud800", "_private", "a.b")))
                holder[key] = draw(odd_values())
            else:
                holder.insert(path[-1], draw(odd_values()))
    return document


def _tweaked(value: Any) -> st.SearchStrategy[Any]:
    if isinstance(value, bool) or value is None:
        return st.just(not value)
    if isinstance(value, int | float):
        return st.sampled_from((-value, value + 1, value * 1000, str(value), [value], value / 3))
    if isinstance(value, str):
        return st.sampled_from((value + "x", value[:-1], value.upper(), value * 300, [value]))
    if isinstance(value, list):
        return st.sampled_from((value * 2, value[:-1], value[::-1], dict(enumerate(value))))
    return st.sampled_from((list(value), list(value.values()), {**value, **value}))


@st.composite
def texts(draw: st.DrawFn, good: Any, names: tuple[str, ...] = ()) -> bytes:
    """A changed document as JSON, its bytes perhaps changed as well."""
    document = draw(documents(good, names))
    escaped = draw(st.booleans())
    raw = json.dumps(document, ensure_ascii=escaped, indent=draw(st.sampled_from((None, 1))))
    return draw(broken(raw.encode("utf-8", "surrogatepass")))


_INSERTS = (
    *(b"\xff\xfe", b"\xef\xbb\xbf", b"\x00", b"\xc3", b"\xed\xa0\x80", b"\\ud800", b"\r\n", b"\\"),
    *(b"NaN", b"1e999999", b"-", b"9" * 5000, b"[" * _DEEP, b'{"a":' * _DEEP, b'"', b",", b"}"),
    *(b'"a":1,"a":2,', b"/*x*/", b"0x1", b"\xf4\x90\x80\x80", b"\x1b[2J"),
)


@st.composite
def broken(draw: st.DrawFn, raw: bytes) -> bytes:
    """Bytes that are cut, spliced or overwritten; three times in four they are left alone."""
    kind = draw(st.sampled_from(("whole",) * 9 + ("cut", "insert", "flip")))
    place = draw(st.integers(0, len(raw))) if kind != "whole" else 0
    if kind == "cut":
        return raw[:place]
    if kind == "insert":
        return raw[:place] + draw(st.sampled_from(_INSERTS)) + raw[place:]
    if kind == "flip" and place < len(raw):
        return raw[:place] + bytes([raw[place] ^ (1 << draw(st.integers(0, 7)))]) + raw[place + 1 :]
    return raw
