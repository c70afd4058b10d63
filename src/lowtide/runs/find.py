"""The runs below a directory, each in one row."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.errors import DataError

from .read import is_run, read_run


@dataclass(frozen=True)
class Row:
    """What is compared of a run; None where it does not tell.

    Attributes:
        name: its path below the directory that was searched.
        path: of its directory.
        state: see `Run.state`; `damaged` where it cannot be read at all.
        model: name of the model.
        method: how gradients were computed.
        steps: updates made.
        iters: updates asked for.
        loss: mean of the last twentieth of the updates.
        best_valid_loss: the lowest.
        elapsed_s: by the clock, all sittings.
        total_tokens: labelled tokens trained on.
        peak_anon_bytes: the highest of an update.
        damaged_lines: left out.
    """

    name: str
    path: str
    state: str
    model: str = ""
    method: str = ""
    steps: int = 0
    iters: int | None = None
    loss: float | None = None
    best_valid_loss: float | None = None
    elapsed_s: float | None = None
    total_tokens: float | None = None
    peak_anon_bytes: float | None = None
    damaged_lines: int = 0


def run_directories(top: Path) -> Iterator[Path]:
    """Directories with a run, `top` among them; hidden ones and links are not entered.

    Args:
        top: where to look.

    Yields:
        Paths in alphabetical order.
    """
    for parent, directories, _ in os.walk(top):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        if is_run(Path(parent)):
            yield Path(parent)


def read_rows(top: Path) -> list[Row]:
    """All runs below a directory.

    Args:
        top: where to look.

    Returns:
        Rows by name.

    Raises:
        DataError: there is no such directory.
    """
    if not top.is_dir():
        found = "a file" if top.exists() else "not there"
        raise DataError(f"{top} is {found}; expected a directory with runs below it.")
    return [_row(top, directory) for directory in run_directories(top)]


def _row(top: Path, directory: Path) -> Row:
    name = os.path.relpath(directory, top)
    name = top.absolute().name if name == "." else name
    try:
        run = read_run(directory)
    except DataError:
        return Row(name, str(directory), "damaged")
    iters, method = run.settings.get("iters"), run.settings.get("method")
    return Row(
        name=name,
        path=str(directory),
        state=run.state,
        model=run.model,
        method=method if isinstance(method, str) else "",
        steps=run.steps[-1] if run.steps else 0,
        iters=iters if isinstance(iters, int) else None,
        loss=run.recent_loss,
        best_valid_loss=run.best_valid[1] if run.best_valid else None,
        elapsed_s=run.last("elapsed_s"),
        total_tokens=run.last("total_tokens"),
        peak_anon_bytes=run.largest("peak_anon_bytes"),
        damaged_lines=run.damaged,
    )


SORTS: dict[str, Callable[[Row], Any]] = {
    "name": lambda row: row.name,
    "state": lambda row: row.state,
    "model": lambda row: row.model,
    "steps": lambda row: -row.steps,
    "loss": lambda row: _known(row.loss),
    "valid": lambda row: _known(row.best_valid_loss),
    "time": lambda row: _known(row.elapsed_s),
    "tokens": lambda row: -(row.total_tokens or 0),
    "memory": lambda row: _known(row.peak_anon_bytes),
}
"""Sort keys: the best or the most first, unknown ones last."""


def _known(value: float | None) -> tuple[bool, float]:
    return value is None, value or 0.0
