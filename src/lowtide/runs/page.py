"""`lowtide report`: one self-contained page about a run."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lowtide.webpage import Block, Bullets, Drawn, Page, Section, Table, Text, to_html

from .charts import Chart, Curve, draw, heat_map, ramp
from .read import Run, SampleRead
from .thin import POINTS, buckets, smooth
from .words import GAP, bytes_in, count_in, event_words, rate_in, seconds_in, value_in

_STYLE = Path(__file__).with_name("report.css")
_SHOWN_SAMPLES, _SHOWN_PROMPTS, _SHOWN_TEXT = 12, 20, 2000
_SHOWN_EVENTS, _SHOWN_ROWS = 60, 16
_UNFOLDED = 6


def report_html(run: Run) -> str:
    """The page.

    Args:
        run: as read from its directory.

    Returns:
        A document that needs nothing else.
    """
    sections = [
        _summary(run),
        Section("Loss", _loss(run)),
        Section("Learning rate and gradients", _gradients(run)),
        Section("Memory", _memory(run)),
        Section("Speed and temperature", _speed(run)),
        Section("Samples", _samples(run.samples)),
        Section("What happened", _events(run)),
        Section("Settings", _settings(run)),
        Section("Model, data, machine", _facts(run)),
        Section("Numbers", _numbers(run)),
    ]
    style = _STYLE.read_text(encoding="utf-8").replace("RAMP", ramp())
    name = run.directory.absolute().name or "run"
    return to_html(Page(f"{name}: a lowtide run", sections, style, themed=True), {})


def _summary(run: Run) -> Section:
    best, end = run.best_valid, run.end or {}
    total = run.settings.get("iters")
    tiles = [
        (f"updates of {total:,}" if isinstance(total, int) else "updates", f"{_last(run):,}"),
        ("loss, mean of the last twentieth", value_in(run.recent_loss)),
        *([("best validation loss, step " + f"{best[0]:,}", value_in(best[1]))] if best else []),
        ("trained tokens", count_in(run.last("total_tokens"))),
        ("time", seconds_in(run.last("elapsed_s"))),
        ("CPU time of the updates", seconds_in(_sum(run, "cpu_s"))),
        ("peak_anon_bytes", bytes_in(run.largest("peak_anon_bytes"))),
        ("peak_rss_bytes, whole process", bytes_in(run.largest("peak_rss_bytes"))),
    ]
    if isinstance(energy := end.get("energy_j"), int | float):
        tiles.append(("energy of the processor, last sitting", f"{energy / 3600:,.1f} Wh"))
    if (heat := run.largest("temperature_c")) is not None:
        tiles.append(("hottest", f"{heat:.0f} °C"))
    drawn = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in tiles
    )
    state = escape(run.state)
    method = escape(str(run.settings.get("method", "")))
    blocks: list[Block] = [
        Drawn(
            f'<p><span class="badge {state}">{state}</span> {escape(run.model)}'
            f'{" with " + method if method else ""}</p><div class="tiles">{drawn}</div>'
        )
    ]
    if isinstance(error := end.get("error"), str):
        blocks.append(Drawn(f'<p class="said">{escape(error[:_SHOWN_TEXT])}</p>'))
    lost = [*run.problems]
    if run.damaged:
        lost.append(f"{run.damaged:,} damaged {_lines(run.damaged)} left out")
    if lost:
        blocks.append(Text(f"This page is not complete: {'; '.join(lost)}."))
    return Section("Summary", blocks)


def _last(run: Run) -> int:
    return run.steps[-1] if run.steps else 0


def _lines(count: int) -> str:
    return "line was" if count == 1 else "lines were"


def _sum(run: Run, key: str) -> float | None:
    values = [v for v in run.figures.get(key, ()) if not math.isnan(v)]
    return sum(values) if values else None


def _x(run: Run) -> tuple[float, float]:
    """From the first to the last thing that is drawn."""
    at = [*run.steps[:1], *run.steps[-1:], *(step for step, _ in run.valid)]
    return (min(at), max(at)) if at else (0, 1)


def _marks(run: Run) -> list[tuple[float, str]]:
    """Sittings after the first, and pauses."""
    told = [e for e in run.starts[1:]] + [e for e in run.events if e.get("event") == "paused"]
    steps = [e.get("step") for e in told[:_SHOWN_EVENTS]]
    low, high = _x(run)
    return [(s, "") for s in steps if isinstance(s, int) and low <= s <= high]


def _charts(run: Run, charts: Sequence[Chart]) -> Drawn:
    return Drawn(f'<div class="charts">{"".join(draw(one, _x(run)) for one in charts)}</div>')


def _loss(run: Run) -> list[Block]:
    column = run.figures.get("loss")
    if column is None and not run.valid:
        return [Text("No update has been recorded yet.")]
    parts = buckets(run.steps, column, POINTS) if column is not None else []
    smoothed = smooth([part.mean for part in parts], max(3, len(parts) // 15))
    curves = [
        Curve("", "c1 thin", [(p.x, p.mean) for p in parts]),
        Curve("training", "c1", [(p.x, y) for p, y in zip(parts, smoothed, strict=True)]),
    ]
    valid = run.valid[:: max(1, len(run.valid) // POINTS)]
    if valid:
        curves += [Curve("", "c2", valid), Curve("validation", "c2 dots", valid)]
    ends = f"from {parts[0].mean:.3f} to {smoothed[-1]:.3f}" if parts else "not recorded"
    says = f"Training loss {ends}"
    if run.valid:
        says += f"; validation loss from {run.valid[0][1]:.3f} to {run.valid[-1][1]:.3f}"
    marks = _marks(run)
    note = (
        "Faint: single updates, or with many of them their means and range. Strong: running mean."
    )
    if marks:
        note += " Upright lines: where the run was taken up again or paused."
    band = parts if column is not None and len(column) > len(parts) else []
    drawn = [c for c in curves if c.points]
    return [
        _charts(
            run,
            [Chart("Loss", drawn, says, "nats per token", band, marks, show=value_in, note=note)],
        )
    ]


def _column(
    run: Run, key: str, pick: Callable[[Any], float], scale: float = 1.0
) -> list[tuple[float, float]]:
    return [
        (part.x, pick(part) * scale)
        for part in buckets(
            run.steps, run.figures.get(key, array("d", [math.nan]) * len(run.steps))
        )
    ]


def _gradients(run: Run) -> list[Block]:
    charts = []
    rate = _column(run, "learning_rate", lambda p: p.mean)
    if rate:
        says = f"Learning rate from {rate[0][1]:.3g} to {rate[-1][1]:.3g}"
        curves = [Curve("", "c3", rate)]
        charts.append(Chart("Learning rate", curves, says, from_zero=True, show=rate_in))
    norm = buckets(run.steps, run.figures["grad_norm"]) if "grad_norm" in run.figures else []
    if norm:
        says = f"Gradient norm between {min(p.low for p in norm):.3g} and "
        says += f"{max(p.high for p in norm):.3g}"
        curve = Curve("", "c1", [(p.x, p.mean) for p in norm])
        charts.append(
            Chart("Gradient norm", [curve], says, "before clipping", norm, from_zero=True)
        )
    blocks: list[Block] = [_charts(run, charts)] if charts else []
    if run.layers:
        x = (run.steps[0], run.steps[-1])
        blocks.append(Drawn(heat_map(run.layers, x, "Gradient norm by layer")))
    missing = [
        name
        for name, there in (
            ("the learning rate of each update", rate),
            ("a global gradient norm (gradients are used one by one)", norm),
            ("gradient norms by layer", run.layers),
        )
        if not there
    ]
    if missing:
        blocks.append(Text(f"Not recorded: {'; '.join(missing)}."))
    return blocks


def _memory(run: Run) -> list[Block]:
    anon = _column(run, "peak_anon_bytes", lambda p: p.high, 1e-6)
    if not anon:
        return [Text("Not recorded.")]
    curves = [Curve("peak_anon_bytes", "c1", anon)]
    budget = run.starts[-1].get("memory_budget_bytes") if run.starts else None
    if isinstance(budget, int | float) and budget > 0:
        ends = [(x, budget / 1e6) for x in _x(run)]
        curves.append(Curve("memory budget", "limit", ends))
    top = max(y for _, y in anon)
    charts = [
        Chart("Memory of an update", curves, f"At most {top:,.1f} MB", "MB above the import",
              from_zero=True, marks=_marks(run))
    ]  # fmt: skip
    whole = _column(run, "peak_rss_bytes", lambda p: p.high, 1e-6)
    mapped = _column(run, "peak_file_bytes", lambda p: p.high, 1e-6)
    curves = [Curve("peak_rss_bytes", "c4", whole), Curve("of it mapped files", "c3", mapped)]
    curves = [curve for curve in curves if curve.points]
    if curves:
        says = f"At most {max(y for _, y in curves[0].points):,.0f} MB"
        note = "Mapped pages, such as those of the weights, are the system's to take back."
        charts.append(Chart("Whole process", curves, says, "MB", from_zero=True, note=note))
    return [_charts(run, charts)]


def _speed(run: Run) -> list[Block]:
    speed, heat = (_column(run, k, lambda p: p.mean) for k in ("tokens_per_s", "temperature_c"))
    charts = []
    if speed:
        says = f"Between {min(y for _, y in speed):,.0f} and {max(y for _, y in speed):,.0f}"
        charts.append(Chart("Tokens per second", [Curve("", "c1", speed)], says, from_zero=True,
                            show=lambda v: f"{v:,.10g}"))  # fmt: skip
    if heat:
        curves = [Curve("", "c2", heat)]
        limit = run.settings.get("max_temperature")
        if isinstance(limit, int | float):
            curves.append(Curve("--max-temperature", "limit", [(x, limit) for x in _x(run)]))
        says = f"At most {max(y for _, y in heat):.0f} °C"
        charts.append(Chart("Temperature", curves, says, "°C"))
    blocks: list[Block] = [_charts(run, charts)] if charts else []
    if not speed:
        blocks.append(Text("Tokens per second were not recorded."))
    if not heat:
        blocks.append(Text("The system did not tell a temperature."))
    return blocks


def _samples(samples: Sequence[SampleRead]) -> list[Block]:
    if not samples:
        return [Text("None were asked for (`--sample-prompt`), or none has been made yet.")]
    by_prompt: dict[str, list[SampleRead]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt, []).append(sample)
    drawn = []
    for prompt, made in list(by_prompt.items())[:_SHOWN_PROMPTS]:
        shown = [made[round(n)] for n in _spread(len(made), _SHOWN_SAMPLES)]
        first, between, last = (
            "".join(map(_sample, part)) for part in (shown[:1], shown[1:-2], shown[1:][-2:])
        )
        folded = f"<details><summary>{len(shown) - 3} between</summary>{between}</details>"
        rows = first + (folded if len(shown) > _UNFOLDED else between) + last
        title = escape(prompt[:_SHOWN_TEXT]) or "(from the beginning)"
        drawn.append(f'<article class="sample"><h3>{title}</h3>{rows}</article>')
    blocks: list[Block] = [Drawn("".join(drawn))]
    left = len(samples) - sum(min(len(made), _SHOWN_SAMPLES) for made in by_prompt.values())
    if left > 0:
        blocks.append(Text(f"{left:,} more are in metrics.jsonl."))
    return blocks


def _sample(sample: SampleRead) -> str:
    text = escape(sample.text.strip()[:_SHOWN_TEXT]) or "(nothing)"
    return f"<div><span>step {sample.step:,}</span><p>{text}</p></div>"


def _spread(count: int, shown: int) -> list[float]:
    """Places of at most `shown` of `count` things, the first and the last among them."""
    if count <= shown:
        return [float(n) for n in range(count)]
    return [n * (count - 1) / (shown - 1) for n in range(shown)]


def _events(run: Run) -> list[Block]:
    if not run.events:
        return [Text("Nothing is recorded of it.")]
    items = [event_words(event) for event in run.events]
    half = _SHOWN_EVENTS // 2
    if len(items) > _SHOWN_EVENTS:
        skipped = f"({len(items) - 2 * half:,} more in events.jsonl)"
        items = [*items[:half], skipped, *items[-half:]]
    warned = [str(text) for start in run.starts[-1:] for text in start.get("data_warnings") or ()]
    return [Bullets([*(f"Data: {text}" for text in warned), *items])]


def _settings(run: Run) -> list[Block]:
    if not run.settings:
        return [Text("run.yaml could not be read.")]
    rows = [[f"`{key}`", _plain(value)] for key, value in run.settings.items()]
    return [Table(("setting", "value"), rows, 2)]


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or GAP
    if isinstance(value, bool):
        return "yes" if value else "no"
    return GAP if value is None else str(value)


def _facts(run: Run) -> list[Block]:
    if not run.starts:
        return [Text("Not recorded.")]
    rows: list[list[str]] = []
    start = run.starts[-1]
    for group in ("model", "adapter", "machine"):
        facts = start.get(group)
        for key, value in facts.items() if isinstance(facts, dict) else ():
            shown = bytes_in(value) if "bytes" in str(key) else _plain(value)
            rows.append([group, str(key).replace("_", " "), shown])
    data = start.get("data")
    for split, facts in data.items() if isinstance(data, dict) else ():
        for key, value in facts.items() if isinstance(facts, dict) else ():
            shown = f"{value:,}" if isinstance(value, int) else _plain(value)
            rows.append([f"data: {split}", str(key).replace("_", " "), shown])
    return [Table(("of", "", ""), rows, 3)]


def _numbers(run: Run) -> list[Block]:
    keys = [
        key
        for key in ("loss", "learning_rate", "grad_norm", "tokens_per_s", "peak_anon_bytes",
                    "temperature_c", "elapsed_s")
        if key in run.figures
    ]  # fmt: skip
    if not run.steps:
        return [Text("No update has been recorded yet.")]
    rows = []
    for place in map(round, _spread(len(run.steps), _SHOWN_ROWS)):
        cells = [run.figures[key][place] for key in keys]
        rows.append(
            [f"{run.steps[place]:,}", *(_cell(k, v) for k, v in zip(keys, cells, strict=True))]
        )
    return [
        Table(("step", *keys), rows, 0, "Some of the updates; metrics.jsonl has them all."),
    ]


def _cell(key: str, value: float) -> str:
    if math.isnan(value):
        return GAP
    if key.endswith("_bytes"):
        return bytes_in(value)
    return seconds_in(value) if key == "elapsed_s" else f"{value:,.4g}"
