"""Charts as HTML: curves in an SVG that stretches, labels beside it in the page's own text.

So the text keeps its size on a phone, and the colours follow the page's theme. No script.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

from .thin import Bucket, bounds, ticks

_WIDTH, _HEIGHT = 1000, 300
_COLUMNS = 240
_COLOURS = ("0d0887", "5601a4", "900da4", "bf3984", "e16462", "f89540", "fdca26", "f0f921")
"""Plasma, from little to much: it is told apart in grey and by most colour-blind readers."""

Format = Callable[[float], str]


class Curve(NamedTuple):
    """A line.

    Attributes:
        name: in the key; empty for none.
        kind: CSS class: `c1` to `c4`, with `thin`, `dots`, `step` or `limit` beside it.
        points: (x, y).
    """

    name: str
    kind: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Curves over the updates.

    Attributes:
        title: what is drawn.
        curves: drawn in their order.
        says: what it shows, for who cannot see it.
        unit: beside the title.
        band: a range behind the curves, from low to high of each bucket.
        marks: (x, what happened), drawn as upright lines.
        from_zero: whether the scale begins at zero.
        show: how a value is written.
        note: under the chart.
    """

    title: str
    curves: Sequence[Curve]
    says: str
    unit: str = ""
    band: Sequence[Bucket] = ()
    marks: Sequence[tuple[float, str]] = ()
    from_zero: bool = False
    show: Format = field(default=lambda value: f"{value:g}")
    note: str = ""


def draw(chart: Chart, x_range: tuple[float, float]) -> str:
    """The chart as HTML.

    Args:
        chart: with at least one point.
        x_range: of the x axis, the same for all charts of a page.

    Returns:
        A figure.
    """
    values = [y for curve in chart.curves for _, y in curve.points]
    values += [edge for bucket in chart.band for edge in (bucket.low, bucket.high)]
    low, high = _range(values, chart.from_zero)
    x0, x1 = x_range[0], max(x_range[1], x_range[0] + 1)

    def at(x: float, y: float) -> str:
        return f"{_n((x - x0) / (x1 - x0) * _WIDTH)} {_n((high - y) / (high - low) * _HEIGHT)}"

    marks_y, marks_x = ticks(low, high, 4), ticks(x0, x1, 5)
    parts = [_path("grid", [[at(x0, y), at(x1, y)] for y in marks_y])]
    if chart.band:
        upper = [at(b.x, b.high) for b in chart.band]
        parts.append(_path("band", [upper + [at(b.x, b.low) for b in reversed(chart.band)]], "Z"))
    if chart.marks:
        parts.append(_path("mark", [[at(x, low), at(x, high)] for x, _ in chart.marks]))
    for curve in chart.curves:
        places = [at(x, y) for x, y in curve.points]
        dots = "dots" in curve.kind or len(places) == 1
        kind = curve.kind if "dots" in curve.kind or not dots else f"{curve.kind} dots"
        parts.append(_path(kind, [[p, p] for p in places] if dots else [places]))
    labels_y = "".join(
        f'<span style="top:{_n((high - y) / (high - low) * 100)}%">{escape(chart.show(y))}</span>'
        for y in marks_y
    )
    labels_x = "".join(_label_x((x - x0) / (x1 - x0) * 100, f"{x:,.10g}") for x in marks_x)
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(chart.says)}">{"".join(parts)}</svg>'
    )
    return _figure(chart, f'<div class="y">{labels_y}</div>{svg}<div class="x">{labels_x}</div>')


def _figure(chart: Chart, plot: str) -> str:
    key = "".join(
        f'<span class="key"><i class="{escape(curve.kind)}"></i>{escape(curve.name)}</span>'
        for curve in chart.curves
        if curve.name
    )
    unit = f' <span class="unit">{escape(chart.unit)}</span>' if chart.unit else ""
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    return (
        f'<figure class="chart"><figcaption><b>{escape(chart.title)}</b>{unit}{key}</figcaption>'
        f'<div class="plot">{plot}</div>{note}</figure>'
    )


def _label_x(percent: float, text: str) -> str:
    """A label under the axis; at its end it stands to the left, so that it stays on the page."""
    edge = ' class="last"' if percent > 96 else ""
    return f'<span{edge} style="left:{_n(percent)}%">{text}</span>'


def _range(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if from_zero:
        low = min(0.0, low)
    room = (high - low) * 0.05 or max(abs(high) * 0.05, 1e-9)
    return (low if from_zero else low - room), high + room


def _path(kind: str, lines: Sequence[Sequence[str]], end: str = "") -> str:
    d = "".join(f"M{places[0]}L{' '.join(places[1:] or places)}{end}" for places in lines if places)
    return f'<path class="{escape(kind)}" d="{d}"/>'


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def heat_map(layers: Sequence[Sequence[float]], x_range: tuple[float, float], title: str) -> str:
    """Gradient norms: layers downwards, updates to the right, on a logarithmic scale of colours.

    Args:
        layers: a column per layer; NaN and zero are left empty.
        x_range: of the updates.
        title: of the figure.

    Returns:
        A figure, with a small PNG that the browser enlarges.
    """
    spans = bounds(len(layers[0]), _COLUMNS)
    rows = [[_log_mean(layer[a:b]) for a, b in spans] for layer in layers]
    known = [value for row in rows for value in row if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    scale = (len(_COLOURS) * 8 - 9) / max(high - low, 1e-9)
    pixels = [
        bytes(0 if value is None else 1 + round((value - low) * scale) for value in row)
        for row in rows
    ]
    image = base64.b64encode(_png(pixels)).decode("ascii")
    count = len(layers)
    shown = sorted({0, count - 1, *range(0, count, max(1, -(-count // 8)))})
    if len(shown) > 2 and shown[-1] - shown[-2] < max(1, count // 12):
        del shown[-2]
    labels = "".join(
        f'<span style="top:{_n((layer + 0.5) / count * 100)}%">{layer}</span>' for layer in shown
    )
    x0, x1 = x_range
    ends = f'<span class="first">{x0:,.10g}</span>{_label_x(100, f"{x1:,.10g}")}'
    least, most = (f"{10**edge:.2g}" for edge in (low, high))
    key = (
        f'<span class="key">{least}<i class="ramp"></i>{most}</span>'
        '<span class="unit">logarithmic</span>'
    )
    says = f"Gradient norms of {count} layers between {least} and {most}"
    return (
        f'<figure class="chart heat"><figcaption><b>{escape(title)}</b>{key}</figcaption>'
        f'<div class="plot"><div class="y">{labels}</div><img alt="{says}" '
        f'style="height:{max(96, min(360, 14 * count))}px" src="data:image/png;base64,{image}">'
        f'<div class="x">{ends}</div></div></figure>'
    )


def ramp() -> str:
    """The heat map's colours as a CSS gradient."""
    return f"linear-gradient(90deg, {', '.join(f'#{colour}' for colour in _COLOURS)})"


def _log_mean(values: Sequence[float]) -> float | None:
    logs = [math.log10(value) for value in values if value > 0]
    return sum(logs) / len(logs) if logs else None


def _png(rows: Sequence[bytes]) -> bytes:
    """An image of palette indices; index 0 is transparent."""
    anchors = [tuple(bytes.fromhex(colour)) for colour in _COLOURS]
    palette = [(128, 128, 128)]
    for place in range((len(anchors) - 1) * 8 + 1):
        first, part = divmod(place, 8)
        after = anchors[min(first + 1, len(anchors) - 1)]
        mixed = (round(a + (b - a) * part / 8) for a, b in zip(anchors[first], after, strict=True))
        palette.append(tuple(mixed))  # type: ignore[arg-type]  # three of them
    head = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    chunks = (
        (b"IHDR", head),
        (b"PLTE", bytes(part for colour in palette for part in colour)),
        (b"tRNS", b"\0"),
        (b"IDAT", data),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
