"""Draws the report's plots, in a process of its own: `python -m lowtide.bench.plots`.

A JSON request on stdin, {"out": directory, "plots": [{"name": ..., "chart": ...}]}, becomes one SVG
file each. Nothing of lowtide is imported here, so that run as a script it loads matplotlib only.
A chart has `kind` (bars, lines or stack), `title`, perhaps `subtitle`, `x_label`, `y_label`, and
what its drawing function names. Legends stand under the axes, where they hide no data.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Chart = dict[str, Any]
_SIZES = {"bars": (5.2, 3.8), "lines": (5.2, 3.7), "stack": (5.2, 4.1)}
_INK, _SOFT = "#1b2530", "#55636f"
_STYLE: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9aa5b0",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e8ec",
    "grid.linewidth": 0.7,
    "text.color": _INK,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.3,
    "lines.markersize": 5,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "path",
    "text.parse_math": False,
    "svg.hashsalt": "lowtide",
    "path.simplify_threshold": 0.4,
}


def bars(axes: Any, chart: Chart) -> None:
    """Groups of bars from zero, each with its value above it.

    `groups`: names; `series`: `name`, `color`, `values` (null: no figure), `missing` (what stands
    there instead), `hollow`; `digits` after the point.
    """
    series, groups = chart["series"], chart["groups"]
    width = 0.88 / len(series)
    number = len(series) * len(groups)
    top = max((v for one in series for v in one["values"] if v is not None), default=1.0)
    for place, one in enumerate(series):
        spots = [g + (place - (len(series) - 1) / 2) * width for g in range(len(groups))]
        heights = [value or 0.0 for value in one["values"]]
        face = {"facecolor": "white", "hatch": "////"} if one.get("hollow") else {}
        style = {"color": one["color"], **face, "edgecolor": one["color"], "linewidth": 0.8}
        if face:
            del style["color"]
        axes.bar(spots, heights, width * 0.86, label=one["name"], **style)
        for spot, value, instead in zip(spots, one["values"], one["missing"], strict=True):
            text = instead if value is None else f"{value:,.{chart.get('digits', 0)}f}"
            turn = 90 if number > 8 or value is None else 0
            size = 8 if number <= 20 else 7
            at = (value or 0.0) + 0.015 * top
            axes.text(spot, at, text, rotation=turn, ha="center", va="bottom", fontsize=size)
    axes.set_xticks(range(len(groups)), groups, color=_INK)
    axes.set_ylim(0, top * (1.2 if number > 8 else 1.12))
    axes.grid(axis="x", visible=False)


def lines(axes: Any, chart: Chart) -> None:
    """Lines over numbers.

    `series`: `name` (empty: not in the legend), `color`, `x`, `y`, `style` (solid, dashed, dotted),
    `marker`, `hollow`, `width`, `alpha`; `x_ticks`: where x is shown on a log scale, with just
    these; `y_ticks`: the same for y; `y_from_zero`.
    """
    for one in chart["series"]:
        hollow = {"markerfacecolor": "white"} if one.get("hollow") else {}
        axes.plot(
            one["x"],
            [float("nan") if value is None else value for value in one["y"]],
            color=one["color"],
            linestyle=one.get("style", "solid"),
            marker=one.get("marker"),
            linewidth=one.get("width", 1.8),
            alpha=one.get("alpha", 1.0),
            label=one["name"] or "_",
            **hollow,
        )
    for axis in ("x", "y"):
        if ticks := chart.get(f"{axis}_ticks"):
            _log_ticks(axes, axis, ticks)


def _log_ticks(axes: Any, axis: str, ticks: list[float]) -> None:
    """A log scale that is labelled at `ticks` only."""
    from matplotlib.ticker import NullFormatter, NullLocator

    (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
    (axes.set_xticks if axis == "x" else axes.set_yticks)(ticks, [f"{t:,g}" for t in ticks])
    one = axes.xaxis if axis == "x" else axes.yaxis
    one.set_minor_locator(NullLocator())
    one.set_minor_formatter(NullFormatter())


def stack(axes: Any, chart: Chart) -> None:
    """Areas on one another, a line over them, one point marked.

    `x`; `series`: `name`, `color`, `y`; `line`: `name`, `y`; `peak`: `x`, `y`, `name`.
    """
    x = chart["x"]
    series = chart["series"]
    if series:
        axes.stackplot(
            x,
            [one["y"] for one in series],
            colors=[one["color"] for one in series],
            labels=[one["name"] for one in series],
            edgecolor="white",
            linewidth=0.2,
        )
    axes.plot(x, chart["line"]["y"], color=_INK, linewidth=1.1, label=chart["line"]["name"])
    peak = chart["peak"]
    axes.plot(
        [peak["x"]],
        [peak["y"]],
        linestyle="none",
        marker="v",
        markersize=8,
        color="#c00000",
        markeredgecolor="white",
        label=peak["name"],
        zorder=5,
        clip_on=False,
    )
    axes.axvline(peak["x"], color="#c00000", linewidth=0.8, linestyle="dotted")
    axes.set_xlim(x[0], x[-1] if x[-1] > x[0] else x[0] + 1)
    axes.set_ylim(0, 1.08 * max(*chart["line"]["y"], peak["y"], 1e-9))
    axes.grid(axis="x", visible=False)


DRAW = {"bars": bars, "lines": lines, "stack": stack}


def draw(chart: Chart, path: Path) -> None:
    """Draw one chart.

    Args:
        chart: see the module.
        path: of the SVG file.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=_SIZES[chart["kind"]], layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        DRAW[chart["kind"]](axes, chart)
        axes.set_xlabel(chart.get("x_label", ""))
        axes.set_ylabel(chart.get("y_label", ""))
        axes.set_title(chart["title"], pad=20 if chart.get("subtitle") else 8)
        if subtitle := chart.get("subtitle"):
            axes.text(0, 1.025, subtitle, transform=axes.transAxes, fontsize=9, color=_SOFT)
        handles, names = axes.get_legend_handles_labels()
        if len(handles) > 1 or chart["kind"] == "stack":
            longest = max(map(len, names))
            columns = 2 if longest > 20 else 3
            figure.legend(handles, names, loc="outside lower center", ncols=columns)
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> int:
    """Draw what stdin asks for; the exit code is 3 where matplotlib is not installed."""
    request = json.load(sys.stdin)
    try:
        import matplotlib  # noqa: F401  # only to see that it is there
    except ImportError as error:
        print(error, file=sys.stderr)
        return 3
    for plot in request["plots"]:
        draw(plot["chart"], Path(request["out"]) / f"{plot['name']}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
