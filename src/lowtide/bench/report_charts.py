"""Colours and chart descriptions for `lowtide.bench.plots`. A method has one colour everywhere.

Colours are Okabe and Ito's, which most colour-blind readers can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .report_data import Case
from .report_paper import paper_figure

Chart = dict[str, Any]

METHOD_ORDER = ("mesp", "mesp store-h", "mebp sweep", "mebp full", "mezo", "lcsb", "autograd")
_METHOD_COLOURS = {
    "mesp": "#0072b2",
    "mesp store-h": "#56b4e9",
    "mebp sweep": "#e69f00",
    "mebp full": "#d55e00",
    "mezo": "#009e73",
    "lcsb": "#cc79a7",
    "autograd": "#4d4d4d",
    "trl+peft, checkpointing": "#5b4b8a",
    "trl+peft, no checkpointing": "#a79fd1",
    "trl+peft+patch, checkpointing": "#2a9d8f",
    "mlx-lm, checkpointing": "#8c6d1f",
    "mlx-lm, no checkpointing": "#cbb26a",
}
_OTHER = "#8c8c8c"
_MARKERS = {"mesp": "o", "mesp store-h": "s", "mebp sweep": "^", "mebp full": "v", "mezo": "D"}
_KIND_COLOURS = {
    "adapter": "#009e73",
    "gradients": "#f0e442",
    "optimizer": "#cc79a7",
    "block inputs": "#0072b2",
    "buffers": "#56b4e9",
    "block intermediates": "#e69f00",
    "loss": "#d55e00",
    "model": "#8c6d1f",
    "allocator": "#e3e6e9",
    "other": "#c3c9cf",
}
_DEPTHS = ("#a6cee3", "#56a0d0", "#0072b2", "#004d7a", "#00263d")


def colour(method: str) -> str:
    """The colour of a method's or a peer's label."""
    return _METHOD_COLOURS.get(method.removesuffix(", inputs in a file"), _OTHER)


def by_method(case: Case) -> tuple[int, str]:
    """Sort key: the order of methods, unknown ones last."""
    known = METHOD_ORDER.index(case.method) if case.method in METHOD_ORDER else len(METHOD_ORDER)
    return known, case.method


def model_chart(cases: Sequence[Case], figure: str, title: str, y_label: str) -> Chart:
    """Bars by model and method, the paper's figures as hollow bars beside ours.

    Args:
        cases: of the group models.
        figure: `peak_anon_bytes` or `wall_s`.
        title: of the chart.
        y_label: of its axis.

    Returns:
        A chart of kind bars.
    """
    models = sorted({case.model for case in cases})
    series: list[Chart] = []
    for method in dict.fromkeys(case.method for case in sorted(cases, key=by_method)):
        of = {case.model: case for case in cases if case.method == method}
        style = {"name": method, "color": colour(method)}
        values = [shown(of[m], figure) if m in of else None for m in models]
        missing = [of[m].status if m in of else "not run" for m in models]
        series.append({**style, "values": values, "missing": missing})
        theirs = [_paper_value(of[m], figure) if m in of else None for m in models]
        if any(value is not None for value in theirs):
            style["name"] += ", paper"
            blank = [""] * len(models)
            series.append({**style, "values": theirs, "missing": blank, "hollow": True})
    return {
        "kind": "bars",
        "title": title,
        "y_label": y_label,
        "groups": models,
        "series": series,
        "digits": 0 if figure.endswith("_bytes") else 1,
    }


def sweep_chart(cases: Sequence[Case], varying: str, figure: str, title: str) -> Chart:
    """Lines over T or r, the paper's dashed; both axes logarithmic.

    Args:
        cases: of a sweep.
        varying: `seq_len` or `lora_r`.
        figure: `peak_anon_bytes` or `wall_s`.
        title: of the chart.

    Returns:
        A chart of kind lines.
    """
    series: list[Chart] = []
    ordered = sorted(cases, key=lambda case: int(case.setting(varying) or 0))
    for method in dict.fromkeys(case.method for case in sorted(cases, key=by_method)):
        own = [case for case in ordered if case.method == method]
        style = {"color": colour(method), "marker": _MARKERS.get(method, "o")}
        x = [int(case.setting(varying) or 0) for case in own]
        series.append({"name": method, "x": x, "y": [shown(c, figure) for c in own], **style})
        points = [(at, _paper_value(case, figure)) for at, case in zip(x, own, strict=True)]
        known = [(at, value) for at, value in points if value is not None]
        if len(known) > 1:
            dashed = {"style": "dashed", "hollow": True, "width": 1.2, **style}
            series.append(
                {
                    "name": f"{method}, paper",
                    "x": [at for at, _ in known],
                    "y": [value for _, value in known],
                    **dashed,
                }
            )
    values = [y for one in series for y in one["y"] if y is not None]
    return {
        "kind": "lines",
        "title": title,
        "x_label": "tokens T" if varying == "seq_len" else "rank r",
        "y_label": "peak, MB" if figure.endswith("_bytes") else "wall seconds per step",
        "series": series,
        "x_ticks": sorted({at for one in series for at in one["x"]}),
        "y_ticks": nice_ticks(values),
    }


def nice_ticks(values: Sequence[float]) -> list[float]:
    """Round numbers for a log axis that reaches over positive values with some room."""
    positive = [value for value in values if value > 0]
    if not positive:
        return []
    low, high = 0.8 * min(positive), 1.25 * max(positive)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [float(f"{step * 10.0**power:.3g}") for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks


def timeline_chart(case: Case, points: int = 400) -> Chart:
    """Live bytes by kind over a step, RssAnon as a line, the peak marked and named.

    Args:
        case: of kind timeline.
        points: at most so many are drawn, each the highest sample of its span of time.

    Returns:
        A chart of kind stack.
    """
    result = case.result
    samples, peak = result["samples"], result["peak"]
    span = max(1, math.ceil(len(samples) / points))
    groups = [samples[at : at + span] for at in range(0, len(samples), span)]
    drawn = [max(group, key=lambda sample: sample["rss_anon_bytes"]) for group in groups]
    kinds = [k for k in result["kinds"] if any(s["bytes"].get(k, 0) > 0 for s in drawn)]
    return {
        "kind": "stack",
        "title": f"{case.method}, {case.model}, T = {case.seq_len}",
        "subtitle": f"peak {peak['rss_anon_bytes'] / 1e6:,.1f} MB in {peak['where']}",
        "x_label": "seconds of the step",
        "y_label": "MB",
        "x": [sample["t_s"] for sample in drawn],
        "series": [
            {
                "name": kind,
                "color": _KIND_COLOURS.get(kind, "#c3c9cf"),
                "y": [sample["bytes"].get(kind, 0) / 1e6 for sample in drawn],
            }
            for kind in kinds
        ],
        "line": {"name": "RssAnon", "y": [s["rss_anon_bytes"] / 1e6 for s in drawn]},
        "peak": {"x": peak["t_s"], "y": peak["rss_anon_bytes"] / 1e6, "name": "peak"},
    }


def cosine_charts(case: Case) -> tuple[Chart, Chart]:
    """MeZO's cosine with the exact gradient: overall against directions, and layer by layer."""
    overall = case.result["overall"]
    directions = sorted(overall, key=int)
    measured = [abs(overall[k]["cosine"]) for k in directions]
    expected = [overall[k]["expected"] for k in directions]
    x = [int(k) for k in directions]
    total = {
        "kind": "lines",
        "title": "Cosine of all parameters",
        "subtitle": case.model,
        "x_label": "directions averaged",
        "y_label": "|cosine|",
        "x_ticks": x,
        "y_ticks": nice_ticks([*measured, *expected]),
        "series": [
            {"name": "mezo", "color": colour("mezo"), "x": x, "y": measured, "marker": "D"},
            {
                "name": "expected by theory",
                "color": "#4d4d4d",
                "x": x,
                "y": expected,
                "style": "dashed",
            },
        ],
    }
    layers = case.result["layers"]
    series = [
        {
            "name": f"{k} direction{'' if k == '1' else 's'}",
            "color": _DEPTHS[min(place, len(_DEPTHS) - 1)],
            "x": [layer["layer"] for layer in layers],
            "y": [layer["cosine"].get(k) for layer in layers],
            "width": 1.3,
        }
        for place, k in enumerate(directions)
    ]
    each = {
        "kind": "lines",
        "title": "Cosine by layer",
        "subtitle": case.model,
        "x_label": "layer",
        "y_label": "cosine",
        "series": series,
    }
    return total, each


def convergence_chart(cases: Sequence[Case], against: str) -> Chart:
    """Loss against `step` or `wall_s`: each step faint, a running mean strong."""
    series: list[Chart] = []
    for case in sorted(cases, key=by_method):
        curve = case.result["curve"]
        x, losses = [p[against] for p in curve], [finite(p.get("loss")) for p in curve]
        style = {"x": x, "color": colour(case.method)}
        # Exact methods lie on one another: a broad line shows under a dashed one.
        form = {"style": "dashed"} if case.method.startswith("mebp") else {"width": 3.0}
        if len(curve) >= 20:
            series.append({"name": "", "y": losses, "alpha": 0.22, "width": 0.7, **style})
        series.append({"name": case.method, "y": running_mean(losses), **form, **style})
    return {
        "kind": "lines",
        "title": f"Loss against {'steps' if against == 'step' else 'seconds'}",
        "x_label": "steps" if against == "step" else "wall seconds",
        "y_label": "training loss",
        "series": series,
    }


def running_mean(losses: Sequence[float | None]) -> list[float | None]:
    """Each point's mean with its neighbours, a twentieth of the curve in all; gaps stay gaps."""
    reach = len(losses) // 40
    out: list[float | None] = []
    for place, loss in enumerate(losses):
        near = losses[max(0, place - reach) : place + reach + 1]
        known = [value for value in near if value is not None]
        out.append(None if loss is None else sum(known) / len(known))
    return out


def finite(value: Any) -> float | None:
    """A number, None where there is none: a diverged loss is a gap in its curve."""
    numeric = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if numeric else None


def shown(case: Case, figure: str) -> float | None:
    """A figure in the unit of tables and plots: MB of 10^6 bytes, or seconds."""
    value = case.number(figure)
    return value / 1e6 if value is not None and figure.endswith("_bytes") else value


def _paper_value(case: Case, figure: str) -> float | None:
    paper = paper_figure(case)
    if paper is None:
        return None
    return paper.megabytes if figure.endswith("_bytes") else paper.wall_s
