"""`lowtide report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowtide.config import setting
from lowtide.runs.page import report_html
from lowtide.runs.read import read_run
from lowtide.train.output import REPORT_FILE
from lowtide.weights.writer import write_atomically

from .output import count, settings_of

_DESCRIPTION = (
    "One self-contained page about a run, finished or going on: curves, memory, samples, what "
    "happened, settings, machine."
)


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Settings of `lowtide report`."""

    run: str = setting(help="the run's directory, --adapter-path of `lowtide train`", filled=True)
    out: str | None = setting(
        None, help="file to write; none takes report.html in the run's directory", filled=True
    )


def run(argv: Sequence[str]) -> int:
    """Write the page and say where it is."""
    if argv and not argv[0].startswith("-"):
        argv = ["--run", *argv]
    settings, output = settings_of(ReportSettings, "report", _DESCRIPTION, argv)
    directory = Path(settings.run).expanduser()
    read = read_run(directory)
    out = Path(settings.out).expanduser() if settings.out else directory / REPORT_FILE
    page = report_html(read).encode("utf-8", "replace")
    write_atomically(out, [page])
    if read.damaged:
        output.say(f"{read.damaged:,} damaged line(s) were left out")
    output.say(f"{out} ({len(page) / 1e3:,.0f} kB): {read.state}, {count(len(read.steps))} updates")
    output.result(
        {
            "out": str(out),
            "bytes": len(page),
            "state": read.state,
            "steps": len(read.steps),
            "damaged_lines": read.damaged,
        }
    )
    return 0
