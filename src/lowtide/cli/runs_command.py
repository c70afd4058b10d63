"""`lowtide runs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lowtide.config import setting
from lowtide.runs.find import SORTS, Row, read_rows
from lowtide.runs.words import GAP, bytes_in, count_in, seconds_in, value_in

from .output import settings_of

_DESCRIPTION = (
    "Find the runs below a directory and compare them. `loss` is the mean of the last twentieth "
    "of the updates, `valid` the best validation loss, `memory` the peak_anon_bytes."
)
_COLUMNS = (
    "name",
    "state",
    "model",
    "method",
    "steps",
    "loss",
    "valid",
    "time",
    "tokens",
    "memory",
)
_TEXT_COLUMNS = 4


@dataclass(frozen=True, kw_only=True)
class RunsSettings:
    """Settings of `lowtide runs`."""

    directory: str = setting(".", help="where to look for runs", filled=True)
    sort: str = setting("name", help="order of the runs", choices=tuple(SORTS))


def run(argv: Sequence[str]) -> int:
    """Print a row for each run."""
    if argv and not argv[0].startswith("-"):
        argv = ["--directory", *argv]
    settings, output = settings_of(RunsSettings, "runs", _DESCRIPTION, argv)
    top = Path(settings.directory).expanduser()
    rows = sorted(read_rows(top), key=SORTS[settings.sort])
    if rows:
        for line in _lines([_COLUMNS, *map(_cells, rows)]):
            output.say(line)
    else:
        output.say(f"no run below {top}; `lowtide train` writes one to its --adapter-path")
    damaged = sum(row.damaged_lines for row in rows)
    if damaged:
        output.say(f"{damaged:,} damaged line(s) were left out")
    output.result({"runs": [asdict(row) for row in rows]})
    return 0


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        row.state,
        row.model or GAP,
        row.method or GAP,
        f"{row.steps:,}" + (f"/{row.iters:,}" if row.iters is not None else ""),
        value_in(row.loss),
        value_in(row.best_valid_loss),
        seconds_in(row.elapsed_s),
        count_in(row.total_tokens),
        bytes_in(row.peak_anon_bytes),
    )


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Text to the left, numbers to the right, each column as wide as it has to be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < _TEXT_COLUMNS else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
