"""The report's sections on steps: models, the two sweeps, store h against recompute h."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lowtide.webpage import Absent, Block, Cell, Figure, Figures, Section, Table, Text

from .report_charts import by_method, model_chart, shown, sweep_chart
from .report_data import Case, Results
from .report_paper import STORE_H_DIFFERENCE_MB, paper_figure

NONE = "\N{EN DASH}"
_FIGURES = ("peak_anon_bytes", "peak_rss_bytes", "wall_s", "cpu_s", "gemm_utilization")
_FIGURE_HEADINGS = (
    "peak_anon_bytes, MB",
    "whole process, MB",
    "wall s/step",
    "CPU s/step",
    "gemm utilisation",
    "memory vs mebp full",
    "time vs mebp full",
)
_PAPER_HEADINGS = ("paper MB", "paper s/step", "paper memory vs MeBP", "paper time vs MeBP")
_READING = (
    f"Percentages are against mebp full of the same case, ours and the paper's each against its "
    f"own; no baseline: there is no measured mebp full of that case. {NONE}: not in the paper."
)


def number(value: float | None, digits: int = 1) -> str:
    """A figure, a dash where there is none."""
    return NONE if value is None else f"{value:,.{digits}f}"


def ratio(value: float | None, other: float | None) -> float | None:
    """`value / other`, None where either is missing or the divisor is zero."""
    return None if value is None or not other else value / other


def change(value: float | None, other: float | None) -> str:
    """`-62.2%`: how much less than the other."""
    of = ratio(value, other)
    return NONE if of is None else minus(f"{100 * (of - 1):+.1f}%")


def minus(text: str) -> str:
    """A printed number with a minus sign as wide as the plus sign."""
    return text.replace("-", "\N{MINUS SIGN}")


def own_figures(case: Case, results: Results) -> list[Cell]:
    """The cells under `_FIGURE_HEADINGS`; one that says why, where the case has no figures."""
    if not case.done:
        return [Absent(case.reason, len(_FIGURE_HEADINGS))]
    digits = (1, 1, 2, 2, 2)
    cells: list[Cell] = [
        number(shown(case, name), d) for name, d in zip(_FIGURES, digits, strict=True)
    ]
    base = results.baseline(case)
    for name in ("peak_anon_bytes", "wall_s"):
        if case.method == "mebp full":
            cells.append("baseline")
        else:
            cells.append(change(case.number(name), base.number(name)) if base else "no baseline")
    return cells


def paper_cells(case: Case) -> list[Cell]:
    """The cells under `_PAPER_HEADINGS`."""
    own, base = paper_figure(case), paper_figure(case, "mebp full")
    if own is None:
        return [NONE] * len(_PAPER_HEADINGS)
    cells: list[Cell] = [number(own.megabytes), number(own.wall_s, 2)]
    if case.method == "mebp full":
        return [*cells, "baseline", "baseline" if own.wall_s else NONE]
    against = (base.megabytes, base.wall_s) if base else (None, None)
    return [*cells, change(own.megabytes, against[0]), change(own.wall_s, against[1])]


def step_table(
    cases: Sequence[Case], results: Results, keys: dict[str, Callable[[Case], Any]], caption: str
) -> Table:
    """One row per case beside the paper's figures.

    Args:
        cases: of kind step.
        results: where baselines are looked for.
        keys: heading -> what it shows of a case, for the columns before the method; rows are in
            the order of these values.
        caption: of the table.

    Returns:
        The table.
    """
    ordered = sorted(cases, key=lambda c: (*[key(c) for key in keys.values()], by_method(c)))
    twice = {
        _row_key(c, keys)
        for c in ordered
        if sum(_row_key(o, keys) == _row_key(c, keys) for o in ordered) > 1
    }
    rows = [
        [
            *[str(key(case)) for key in keys.values()],
            # Two cases may differ in a setting that has no column: their names tell them apart.
            f"{case.method} ({case.name})" if _row_key(case, keys) in twice else case.method,
            *own_figures(case, results),
            *paper_cells(case),
        ]
        for case in ordered
    ]
    columns = (*keys, "method", *_FIGURE_HEADINGS, *_PAPER_HEADINGS)
    return Table(columns, rows, len(keys) + 1, caption)


def _row_key(case: Case, keys: dict[str, Callable[[Case], Any]]) -> tuple[Any, ...]:
    return (*[key(case) for key in keys.values()], case.method)


def models_section(results: Results) -> Section:
    """Method by model."""
    cases = [case for case in results.group("models") if case.kind == "step"]
    if not cases:
        return absent("Models", "models")
    memory = "Peak memory by model and method, the figures of the table above."
    time = "Wall seconds of a step by model and method, the figures of the table above."
    figures = [
        Figure(
            "models-memory",
            model_chart(cases, "peak_anon_bytes", "Peak memory", "peak_anon_bytes, MB"),
            memory,
            "Peak of RssAnon above the import. Hatched: the paper's MeBP and MeSP, of a whole "
            "process on an iPhone.",
        ),
        Figure(
            "models-time",
            model_chart(cases, "wall_s", "Time of a step", "wall seconds"),
            time,
            "Median step, wall seconds. Hatched: the paper's, on an iPhone.",
        ),
    ]
    caption = (
        "Median of the measured steps, then of the rounds, in which the cases took turns; the step "
        f"that warms up is left out. {_READING}"
    )
    keys: dict[str, Callable[[Case], Any]] = {"model": lambda case: case.model}
    if len({case.seq_len for case in cases}) > 1:
        keys["T"] = lambda case: case.seq_len
    where = ", ".join(f"T = {t}" for t in sorted({case.seq_len for case in cases}))
    note = Text(f"Each method in a process of its own, {where}. {rank_note(cases)}")
    return Section("Models", [note, step_table(cases, results, keys, caption), Figures(figures)])


def sweep_section(results: Results, group: str, varying: str, title: str) -> Section:
    """Memory and time over T or r."""
    cases = results.with_shared(group, varying)
    if not cases:
        return absent(title, group)
    heading = "T" if varying == "seq_len" else "r"
    keys: dict[str, Callable[[Case], Any]] = {heading: lambda case: int(case.setting(varying) or 0)}
    if len({case.model for case in cases}) > 1:
        keys = {"model": lambda case: case.model, **keys}
    fixed = rank_note(cases) if varying == "seq_len" else f"T = {cases[0].seq_len}."
    models = ", ".join(dict.fromkeys(case.model for case in cases))
    blocks: list[Block] = [
        Text(f"{models}; {fixed}"),
        step_table(cases, results, keys, _READING),
    ]
    figures = []
    for model in dict.fromkeys(case.model for case in cases):
        own = [case for case in cases if case.model == model]
        for figure, short in (("peak_anon_bytes", "memory"), ("wall_s", "time")):
            name = f"{group}-{short}" + ("" if "model" not in keys else f"-{model}")
            what = "Peak memory" if short == "memory" else "Time of a step"
            chart = sweep_chart(own, varying, figure, f"{what}, {model}")
            alt = f"{what} of {model} over {heading} by method, the figures of the table above."
            caption = f"{what} over {heading}, both axes logarithmic; dashed: the paper's figures."
            if not any(one["name"].endswith(", paper") for one in chart["series"]):
                caption = f"{what} over {heading}, both axes logarithmic."
            figures.append(Figure(name, chart, alt, caption))
    return Section(title, [*blocks, Figures(figures)])


def store_h_section(results: Results) -> Section:
    """Store h against recompute h: what was measured beside the bytes of h."""
    title = "Store h against recompute h"
    example = (
        f"The paper reports 398.5 MB with h stored and 368.4 MB with h recomputed on the 3B model, "
        f"{STORE_H_DIFFERENCE_MB:.1f} MB apart. All of h there is 7 linears x 36 layers x 256 "
        f"tokens x rank 8 x 4 bytes = {7 * 36 * 256 * 8 * 4 / 1e6:.2f} MB in float32, and half "
        "that in 16 bit: the paper's 30 MB difference is not h alone."
    )
    cases = results.with_shared("store_h", "recompute_h")
    cases = [case for case in cases if case.method in ("mesp", "mesp store-h")]
    if not cases:
        return Section(title, [*absent(title, "store_h").blocks, Text(example)])
    keys: dict[str, Callable[[Case], Any]] = {
        "model": lambda case: case.model,
        "T": lambda case: case.seq_len,
        "r": lambda case: case.rank,
    }
    rows = [
        _h_row(stored, [c for c in cases if c.method == "mesp" and c.shared() == stored.shared()])
        for stored in cases
        if stored.method == "mesp store-h"
    ]
    columns = (
        *keys,
        "linears x layers x T x r x bytes",
        "bytes of h, MB",
        "measured difference, MB",
        "wall s, store less recompute",
        "paper's difference, MB",
    )
    blocks: list[Block] = [
        Text(example),
        step_table(cases, results, keys, _READING),
        Table(columns, rows, 4, "The bytes of h from the model's shape beside what was measured."),
    ]
    return Section(title, blocks)


def _h_row(stored: Case, recomputed: Sequence[Case]) -> list[Cell]:
    """One row of the table of h."""
    h = stored.h_bytes()
    words = "the model's number of layers is not known"
    formula: list[Cell] = [h[1], f"{h[0] / 1e6:.2f}"] if h else [Absent(words, 2)]
    other = next(iter(recomputed), None)
    row: list[Cell] = [stored.model, str(stored.seq_len), str(stored.rank), *formula]
    if not stored.done:
        row.append(Absent(stored.reason, 2))
    elif other is None or not other.done:
        reason = other.reason if other else "not run: recompute h of this case"
        row.append(Absent(reason, 2))
    else:
        memory = stored.result["peak_anon_bytes"] - other.result["peak_anon_bytes"]
        time = stored.result["wall_s"] - other.result["wall_s"]
        row += [minus(f"{memory / 1e6:+.2f}"), minus(f"{time:+.2f}")]
    with_h, without = paper_figure(stored), paper_figure(stored, "mesp")
    known = with_h is not None and without is not None
    row.append(f"{STORE_H_DIFFERENCE_MB:+.1f}" if known else NONE)
    return row


def absent(title: str, group: str) -> Section:
    """A section without data, which says so."""
    return Section(title, [Text(f"Not measured: this directory holds no case of group `{group}`.")])


def rank_note(cases: Sequence[Case]) -> str:
    """`LoRA r = 8 on all-linear, sgd, float32.` with what the cases have in common."""
    parts = []
    for name, words in (
        ("lora_r", "LoRA r = {}"),
        ("target_modules", "on {}"),
        ("optimizer", "optimiser {}"),
        ("compute_dtype", "{}"),
        ("batch_size", "batch {}"),
    ):
        values = {str(case.setting(name)) for case in cases if case.setting(name) is not None}
        if values:
            shown_values = " / ".join(sorted(values, key=lambda value: (len(value), value)))
            parts.append(words.format(shown_values))
    return f"{', '.join(parts).replace(', on ', ' on ')}." if parts else ""
