"""The report's other sections: machine, summary, differences, failures, how it was made."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from lowtide.webpage import Absent, Block, Bullets, Cell, Section, Table, Text

from .child import flags_of
from .report_data import Case, Results
from .report_paper import paper_figure
from .report_steps import NONE, ratio
from .results import GROUPS

_ENVIRONMENT = {
    "cpu": "processor",
    "cores": "cores",
    "threads": "threads of torch",
    "memory_bytes": "memory",
    "platform": "system",
    "lowtide": "lowtide",
    "git_revision": "git revision",
    "torch": "torch",
    "python": "Python",
}


def machine_section(results: Results) -> Section:
    """Every distinct environment that cases were measured in."""
    found: dict[str, tuple[Mapping[str, Any], int]] = {}
    for case in results.cases:
        key = json.dumps(case.environment, sort_keys=True, default=str)
        found[key] = (case.environment, found.get(key, ({}, 0))[1] + 1)
    environments = [environment for environment, _ in found.values()]
    names = list(_ENVIRONMENT) + sorted({n for e in environments for n in e} - set(_ENVIRONMENT))
    rows = [
        [_ENVIRONMENT.get(name, name), *[_fact(name, e.get(name)) for e in environments]]
        for name in names
        if any(e.get(name) is not None for e in environments)
    ]
    heads = ["", *[f"{n} case{'s' * (n != 1)}" for _, n in found.values()]]
    blocks: list[Block] = [Table(heads, rows, len(heads))]
    if len(environments) > 1:
        blocks.insert(
            0,
            Text(
                f"These results come from {len(environments)} environments, which differ where "
                "the columns do: compare times between them with care."
            ),
        )
    started = sorted(case.started for case in results.cases if case.started)
    if started:
        blocks.append(Text(f"Measured from {started[0]} to {started[-1]}."))
    return Section("Machine and versions", blocks)


def _fact(name: str, value: Any) -> str:
    if value is None:
        return "not recorded"
    if name == "memory_bytes" and isinstance(value, int | float):
        return f"{value / 1e9:,.1f} GB"
    return str(value)


def summary_section(results: Results) -> Section:
    """Computed: mesp against mebp full and sweep, mezo against mesp; one paragraph per model."""
    sentences = []
    seen = set()
    steps = sorted(results.steps(), key=lambda case: (GROUPS.index(case.group), case.model))
    for case in steps:
        if case.method == "mesp" and case.model not in seen:
            told = _compared(case, results)
            if told:
                seen.add(case.model)
                sentences.append(told)
    if not sentences:
        text = "No pair of mesp and mebp of the same case was measured, so there is no ratio yet."
        return Section("Summary", [Text(text, lead=True)])
    missing = sum(not case.done for case in results.cases)
    if missing:
        of = f"{missing} of {len(results.cases)} cases"
        sentences[0] += f" {of} failed or were skipped; they are listed below, with the reasons."
    blocks: list[Block] = [Text(sentences[0], lead=True)]
    if len(sentences) > 1:
        blocks.append(Bullets(sentences[1:]))
    return Section("Summary", blocks)


def _compared(mesp: Case, results: Results) -> str:
    """What a case of mesp needs, as a share of the other methods' need; empty without any."""
    shares = []
    for method, words in (("mebp full", "full logits"), ("mebp sweep", "the one-sweep loss")):
        other = results.baseline(mesp, method)
        memory = _of(mesp, other, "peak_anon_bytes")
        if other is not None and memory is not None:
            time, cpu = _of(mesp, other, "wall_s"), _of(mesp, other, "cpu_s")
            shares.append(
                f"{memory:.2f} of the memory of mebp with {words} "
                f"({other.result['peak_anon_bytes'] / 1e6:,.1f} MB) and {_share(time)} of its wall "
                f"time ({_share(cpu)} of its CPU time)"
            )
    if not shares:
        return ""
    own = mesp.result["peak_anon_bytes"] / 1e6
    text = (
        f"{mesp.model}, T = {mesp.seq_len}: mesp peaks at {own:,.1f} MB, {'; and '.join(shares)}."
    )
    mezo = results.baseline(mesp, "mezo")
    if mezo is not None:
        text += (
            f" mezo peaks at {mezo.result['peak_anon_bytes'] / 1e6:,.1f} MB, "
            f"{_share(_of(mezo, mesp, 'peak_anon_bytes'))} of mesp, in "
            f"{_share(_of(mezo, mesp, 'wall_s'))} of its wall time."
        )
    ours, base = paper_figure(mesp), paper_figure(mesp, "mebp full")
    if ours is not None and base is not None:
        text += (
            f" The paper's MeSP needs {_share(ratio(ours.megabytes, base.megabytes))} of the memory"
            f" of its MeBP"
        )
        time = ratio(ours.wall_s, base.wall_s)
        text += f" and {time:.2f} of its time." if time else "."
    return text


def _of(case: Case, other: Case | None, figure: str) -> float | None:
    return ratio(case.number(figure), other.number(figure)) if other else None


def _share(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def differences_section() -> Section:
    """What is measured differently from the paper, and why."""
    items = [
        "Memory: the paper samples phys_footprint every 0.5 s on an iPhone; we poll RssAnon, its "
        "counterpart on Linux, about every millisecond. What rises and falls between two "
        "samples half a second apart is not in the paper's figure, and is in ours.",
        "What is counted: the paper's figure is of the whole process, its app and runtime "
        "included; `peak_anon_bytes` is what training adds to RssAnon right after "
        "`import lowtide`, which leaves out Python and torch. The tables show the whole process "
        "beside it: its peak RSS, with mapped weight pages, which the kernel may drop at any time.",
        "Weights: the paper's base is 4-bit and decompressed lazily, so its MeBP holds dequantised "
        "blocks while autograd runs over them. Ours is bfloat16 in a mapped file, widened tile by "
        "tile into a small buffer. Mapped pages are not in RssAnon and so not in "
        "`peak_anon_bytes`; mebp widens its weights again in the backward as well.",
        "Loss: the paper's baseline forms the full logits. `mebp full` does so too; `mebp sweep` "
        "has the loss of mesp, so that what the loss saves and what the blocks save can be told "
        "apart.",
        "Machine: the paper's times are of a phone's GPU and CPU, ours of x86 cores. Only ratios "
        "within one machine compare; the columns of percentages are those.",
        "Optimiser: SGD in the paper and in these steps unless a case says otherwise; it holds no "
        "state. AdamW would add eight bytes per adapter parameter to every method alike.",
        "Time: the paper recomputes h at a small cost in time against MeBP (0.86 s against 0.68 s "
        "a step at 0.5B). Our mebp and mesp both recompute the block, so the times differ by what "
        "autograd adds and by the products that mesp leaves out.",
    ]
    return Section("What is measured differently from the paper, and why", [Bullets(items)])


def failures_section(results: Results) -> Section:
    """Failed and skipped cases with their reasons, in full."""
    rows: list[list[Cell]] = [
        [case.name, case.group, case.status, Absent(case.error.strip() or "no reason was recorded")]
        for case in results.cases
        if not case.done
    ]
    if not rows:
        return Section("Failed and skipped cases", [Text("None: every case has a result.")])
    return Section(
        "Failed and skipped cases", [Table(("case", "group", "status", "reason"), rows, 4)]
    )


def commands_section(results: Results) -> Section:
    """How each figure was made."""
    directory = results.directory.name
    text = (
        "Every case ran in a process of its own and is one file, "
        f"`{directory}/cases/NAME.json`, with its settings, environment and result. `lowtide bench "
        "paper` and `lowtide bench peers` write such a directory and go on where one was "
        f"interrupted; `lowtide bench report {directory}` made this page. A single case can be "
        "measured again with the command beside it."
    )
    rows = [[case.name, f"`{command_line(case)}`"] for case in results.cases]
    return Section("How each figure was made", [Text(text), Table(("case", "command"), rows, 2)])


def command_line(case: Case) -> str:
    """The command that measures a case again."""
    settings = dict(case.settings)
    words = {
        "step": ["bench", "step"],
        "timeline": ["bench", "timeline"],
        "quality": ["bench", "quality"],
        "convergence": ["bench", "paper"],
        "peer": ["bench", "peers"],
    }[case.kind]
    if case.kind == "peer":
        settings = {name: settings.get(name) for name in ("model", "seq_len", "steps")}
        settings["out"] = "DIR"
    if case.kind == "convergence":  # it makes its data and reads the log of `lowtide train`
        settings = {"only": "convergence", "out": "DIR"}
    return shlex.join(["lowtide", *words, *flags_of(settings)])
