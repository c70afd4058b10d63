"""The report's sections on timelines, gradient quality, convergence and peers."""

from __future__ import annotations

from collections.abc import Sequence

from lowtide.webpage import Absent, Block, Cell, Figure, Figures, Section, Table, Text

from .report_charts import (
    Chart,
    by_method,
    colour,
    convergence_chart,
    cosine_charts,
    finite,
    shown,
    timeline_chart,
)
from .report_data import Case, Results
from .report_paper import MEZO_COSINE
from .report_steps import NONE, absent, change, minus, number

_TIMELINE = "Memory over one step"
_QUALITY = "Gradient quality of MeZO"
_CONVERGENCE = "Convergence"
_PEERS = "Peers"


def timeline_section(results: Results) -> Section:
    """Live bytes by kind over one step of each method."""
    cases = _of_kind(results, "timeline")
    if not cases:
        return absent(_TIMELINE, "timeline")
    done = sorted((case for case in cases if case.done), key=by_method)
    figures = [
        Figure(
            f"memory-{case.file_name}",
            timeline_chart(case),
            f"Memory of {case.method} over one step: peak "
            f"{case.result['peak']['rss_anon_bytes'] / 1e6:,.1f} MB in "
            f"{case.result['peak']['where']}.",
            f"{case.method}: the peak is at {case.result['peak']['t_s']:.2f} s, in "
            f"`{case.result['peak']['where']}`.",
        )
        for case in done
    ]
    note = Text(
        "Areas: live bytes by kind; `allocator` is what was freed and malloc has not given back. "
        "Line: RssAnon above what it was right after the import. Each plot has its own scale, and "
        "each point is the highest sample of its span of time."
    )
    blocks: list[Block] = [note]
    if done:
        blocks += [Figures(figures), _peak_table(done)]
    return Section(_TIMELINE, blocks + _unfinished(cases))


def _peak_table(cases: Sequence[Case]) -> Table:
    """What was live at each peak."""
    peaks = [case.result["peak"] for case in cases]
    kinds = list(dict.fromkeys(kind for case in cases for kind in case.result["kinds"]))
    rows: list[list[Cell]] = [
        [kind, *[number(peak["bytes"].get(kind, 0) / 1e6, 2) for peak in peaks]] for kind in kinds
    ]
    rows.append(["sum by kind", *[number(peak["sum_bytes"] / 1e6, 2) for peak in peaks]])
    rows.append(["RssAnon", *[number(peak["rss_anon_bytes"] / 1e6, 2) for peak in peaks]])
    shares = [peak["sum_bytes"] / max(1, peak["rss_anon_bytes"]) for peak in peaks]
    rows.append(["sum / RssAnon", *[f"{share:.1%}" for share in shares]])
    places = list(dict.fromkeys(f"{case.model}, T = {case.seq_len}" for case in cases))
    caption = f"What is live at the peak: {places[0]}." if len(places) == 1 else "At the peak."
    own = [f", {case.model}, T = {case.seq_len}" if len(places) > 1 else "" for case in cases]
    heads = [case.method + place for case, place in zip(cases, own, strict=True)]
    return Table(["MB", *heads], rows, 1, caption)


def quality_section(results: Results) -> Section:
    """MeZO's cosine with the exact gradient beside what theory gives."""
    cases = _of_kind(results, "quality")
    if not cases:
        return absent(_QUALITY, "quality")
    blocks: list[Block] = [
        Text(
            "Cosine of MeZO's estimate, the mean of k random directions, with the exact gradient. "
            "Theory gives sqrt(k / (n + k + 1)) for the size of the cosine of n parameters; with "
            "few directions the measured one is a random draw of about that size, of either sign. "
            f"The paper reports about {MEZO_COSINE:g}."
        )
    ]
    for case in (case for case in cases if case.done):
        overall, layers = case.result["overall"], case.result["layers"]
        directions = sorted(overall, key=int)
        rows: list[list[Cell]] = [
            [
                k,
                _cosine(overall[k]["cosine"]),
                f"{overall[k]['expected']:.6f}",
                f"{abs(overall[k]['cosine']) / overall[k]['expected']:.2f}",
            ]
            for k in directions
        ]
        n = int(case.result["n_parameters"])
        caption = f"{case.model}, {n:,} adapter parameters, all layers together."
        columns = ("directions k", "cosine", "expected size", "|cosine| / expected")
        total, each = cosine_charts(case)
        figures = [
            Figure(
                f"{case.file_name}-overall",
                total,
                f"Cosine against directions: {_pairs(rows)}.",
                "Cosine of all parameters against the directions averaged, both axes logarithmic.",
            ),
            Figure(
                f"{case.file_name}-layers",
                each,
                f"Cosine layer by layer, {len(layers)} layers; the table has the values.",
                "Each layer's own parameters; the number of directions from light to dark.",
            ),
        ]
        per_layer: list[list[Cell]] = [
            [str(layer["layer"]), *[_cosine(layer["cosine"].get(k)) for k in directions]]
            for layer in layers
        ]
        heads = ["layer", *[f"k = {k}" for k in directions]]
        blocks += [
            Table(columns, rows, 0, caption),
            Figures(figures),
            Table(heads, per_layer, 1, f"{case.model}: cosine of each layer's parameters."),
        ]
    return Section(_QUALITY, blocks + _unfinished(cases))


def _pairs(rows: Sequence[Sequence[Cell]]) -> str:
    return "; ".join(f"{row[0]} directions {row[1]}, expected {row[2]}" for row in rows)


def _cosine(value: float | None) -> str:
    return NONE if value is None else minus(f"{value:.6f}")


def convergence_section(results: Results) -> Section:
    """Loss against steps and against seconds."""
    cases = _of_kind(results, "convergence")
    if not cases:
        return absent(_CONVERGENCE, "convergence")
    done = sorted((case for case in cases if case.done), key=by_method)
    rows: list[list[Cell]] = []
    for case in done:
        curve, valid = case.result["curve"], case.result.get("valid") or []
        losses = [finite(point.get("loss")) for point in curve]
        checks = [finite(point.get("loss")) for point in valid]
        tail = [loss for loss in losses[-max(1, len(losses) // 20) :] if loss is not None]
        rows.append(
            [
                case.method,
                case.model,
                str(curve[-1]["step"]),
                number(curve[-1]["wall_s"]),
                number(losses[0], 3),
                number(sum(tail) / len(tail), 3) if tail else "not finite",
                number(checks[0], 3) if checks else NONE,
                number(checks[-1], 3) if checks else NONE,
            ]
        )
    columns = (
        "method",
        "model",
        "steps",
        "seconds",
        "first loss",
        "last loss",
        "first validation loss",
        "last validation loss",
    )
    blocks: list[Block] = []
    if done:
        data = ", ".join(sorted({str(case.setting("data") or "data not named") for case in done}))
        caption = f"Data: {data}. The last loss is the mean of the last twentieth of the steps."
        said = "; ".join(f"{row[0]} from {row[4]} to {row[5]} in {row[3]} s" for row in rows)
        smooth = "Faint: each step. Strong: running mean over a twentieth of the curve."
        figures = [
            Figure(
                f"convergence-{name}",
                convergence_chart(done, against),
                f"Training loss against {name}: {said}.",
                smooth,
            )
            for name, against in (("steps", "step"), ("seconds", "wall_s"))
        ]
        blocks = [Table(columns, rows, 2, caption), Figures(figures)]
    return Section(_CONVERGENCE, blocks + _unfinished(cases))


def peers_section(results: Results) -> Section:
    """Other trainers on the same machine, with mesp beside them."""
    peers = results.group("peers")
    if not peers:
        return absent(_PEERS, "peers")
    places = {(case.model, case.seq_len) for case in peers}
    ours: dict[tuple[str, int], Case] = {}
    for case in results.steps():
        if case.method == "mesp" and case.rank in {0, *(p.rank or case.rank for p in peers)}:
            ours.setdefault((case.model, case.seq_len), case)
    beside = [ours[place] for place in sorted(places) if place in ours]
    cases = [*(case for case in beside if case not in peers), *peers]
    cases.sort(key=lambda case: (case.model, case.seq_len, by_method(case)))
    above = "peak_anon_above_import_bytes"
    rows: list[list[Cell]] = []
    for case in cases:
        head: list[Cell] = [case.model, str(case.seq_len) if case.seq_len else NONE, case.method]
        if not case.done:
            rows.append([*head, Absent(case.reason, 5)])
            continue
        mesp = ours.get((case.model, case.seq_len))
        theirs = case.number("peak_anon_bytes")
        against = change(mesp.number("peak_anon_bytes"), theirs) if mesp else NONE
        rows.append(
            [
                *head,
                number(shown(case, "peak_anon_bytes")),
                _recorded(shown(case, above if case.kind == "peer" else "peak_anon_bytes")),
                number(case.number("wall_s"), 2),
                number(case.number("cpu_s"), 2),
                "this is mesp" if case.method == "mesp" else against,
            ]
        )
    columns = (
        "model",
        "T",
        "trainer",
        "peak_anon_bytes, MB",
        "with its weights, MB",
        "wall s",
        "CPU s",
        "mesp's memory against it",
    )
    caption = (
        "Each in a process of its own, mesp beside them where it was measured at the same T. A "
        "peer's peak_anon_bytes is counted above its loaded model; the copy of the weights that it "
        "holds is in the next column, which is counted above the import, as mesp's are both."
    )
    blocks: list[Block] = [Table(columns, rows, 3, caption)]
    if any(case.done for case in cases):
        chart = _peer_chart([case for case in cases if case.done])
        said = "; ".join(f"{row[2]} at T = {row[1]}: {row[3]} MB" for row in rows if len(row) > 4)
        blocks.append(Figures([Figure("peers-memory", chart, f"Peak memory: {said}.")]))
    return Section(_PEERS, blocks)


def _recorded(value: float | None) -> str:
    return "not recorded" if value is None else number(value)


def _peer_chart(cases: Sequence[Case]) -> Chart:
    groups = list(dict.fromkeys((case.model, case.seq_len) for case in cases))
    series: list[Chart] = []
    for method in dict.fromkeys(case.method for case in sorted(cases, key=by_method)):
        of = {(c.model, c.seq_len): c for c in cases if c.method == method}
        values = [shown(of[place], "peak_anon_bytes") if place in of else None for place in groups]
        missing = ["not run"] * len(groups)
        series.append(
            {"name": method, "color": colour(method), "values": values, "missing": missing}
        )
    return {
        "kind": "bars",
        "title": "Peak memory beside other trainers",
        "y_label": "peak, MB",
        "groups": [f"{model}\nT = {tokens}" for model, tokens in groups],
        "series": series,
    }


def _of_kind(results: Results, kind: str) -> list[Case]:
    return [case for case in results.cases if case.kind == kind]


def _unfinished(cases: Sequence[Case]) -> list[Block]:
    """A table of the cases that have no result."""
    rows: list[list[Cell]] = [
        [case.model, case.method, Absent(case.reason)] for case in cases if not case.done
    ]
    return [Table(("model", "method", "no result"), rows, 3)] if rows else []
