"""A run as its files tell it; whatever is damaged in them is left out and counted."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lowtide.errors import DataError

from .lines import Lines, number
from .processes import process_identity

SETTINGS, METRICS, EVENTS = "run.yaml", "metrics.jsonl", "events.jsonl"
FIGURES = (
    "loss",
    "n_tokens",
    "total_tokens",
    "learning_rate",
    "grad_norm",
    "tokens_per_s",
    "wall_s",
    "cpu_s",
    "elapsed_s",
    "peak_anon_bytes",
    "peak_rss_bytes",
    "peak_file_bytes",
    "disk_read_bytes",
    "temperature_c",
)
_LAYERS = 4096
_NAN = math.nan


class SampleRead(NamedTuple):
    """What was generated after `step` updates."""

    step: int
    prompt: str
    text: str


@dataclass
class Run:
    """Everything that a run's directory says of it.

    Attributes:
        directory: of the run.
        settings: of run.yaml.
        events: lines of events.jsonl.
        steps: numbers of the updates, ascending.
        figures: a column for each key of FIGURES that occurs, NaN where an update has none.
        layers: gradient norms, a column per layer.
        valid: (step, loss) of each validation.
        samples: in their order.
        damaged: lines that could not be read.
        problems: what else could not be read.
    """

    directory: Path
    settings: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    steps: array[int] = field(default_factory=lambda: array("q"))
    figures: dict[str, array[float]] = field(default_factory=dict)
    layers: list[array[float]] = field(default_factory=list)
    valid: list[tuple[int, float]] = field(default_factory=list)
    samples: list[SampleRead] = field(default_factory=list)
    damaged: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def starts(self) -> list[dict[str, Any]]:
        """An event for each sitting."""
        return [event for event in self.events if event.get("event") == "start"]

    @property
    def state(self) -> str:
        """`running`, `paused`, `finished`, `interrupted`, `failed`, or `unknown` without events."""
        kinds = [e for e in self.events if e.get("event") in ("start", "end", "paused", "went on")]
        if not kinds:
            return "unknown"
        if kinds[-1]["event"] == "end":
            return str(kinds[-1].get("state", "unknown"))
        if not is_alive(self.starts[-1].get("process") if self.starts else None):
            return "interrupted"
        return "paused" if kinds[-1]["event"] == "paused" else "running"

    @property
    def end(self) -> dict[str, Any] | None:
        """The last event, where it tells of the end."""
        last = self.events[-1] if self.events else {}
        return last if last.get("event") == "end" else None

    def fact(self, group: str, key: str) -> Any:
        """What the last sitting's start says, such as `machine`, `cpu`; None where nothing."""
        facts = self.starts[-1].get(group) if self.starts else None
        return facts.get(key) if isinstance(facts, dict) else None

    @property
    def model(self) -> str:
        """The model's name: the last part of its directory or hub id."""
        found = self.settings.get("model") or self.fact("model", "directory") or ""
        return str(found).rstrip("/").split("/")[-1]

    def last(self, key: str) -> float | None:
        """The last value of a figure that is a number."""
        return next((v for v in reversed(self.figures.get(key, ())) if not math.isnan(v)), None)

    def largest(self, key: str) -> float | None:
        """The largest value of a figure."""
        return max((v for v in self.figures.get(key, ()) if not math.isnan(v)), default=None)

    @property
    def recent_loss(self) -> float | None:
        """The mean loss of the last twentieth of the updates."""
        column = self.figures.get("loss", array("d"))
        tail = [v for v in column[-max(1, len(column) // 20) :] if not math.isnan(v)]
        return sum(tail) / len(tail) if tail else None

    @property
    def best_valid(self) -> tuple[int, float] | None:
        """(step, loss) of the best validation."""
        return min(self.valid, key=lambda one: one[1], default=None)


def is_run(directory: Path) -> bool:
    """Whether a directory holds what a run writes while it trains."""
    return (directory / METRICS).is_file() or (directory / EVENTS).is_file()


def is_alive(process: Any) -> bool:
    """Whether the process that a start names is still there."""
    if not isinstance(process, dict) or not isinstance(process.get("pid"), int):
        return False
    return process_identity(process["pid"]) == process


def read_run(directory: Path) -> Run:
    """Read a run's files.

    Args:
        directory: of the run.

    Returns:
        The run; what cannot be read of it is in `damaged` and `problems`.

    Raises:
        DataError: there is no run in the directory.
    """
    if not is_run(directory):
        raise DataError(_no_run(directory))
    run = Run(directory)
    _read_settings(run)
    events, metrics = Lines(directory / EVENTS), Lines(directory / METRICS)
    try:
        run.events = [event for event in events if isinstance(event.get("event"), str)]
        rows = _Rows(run)
        for entry in metrics:
            rows.take(entry)
        run.damaged = events.damaged + metrics.damaged + rows.refused
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be read: {error.strerror}. Make it readable for you."
        ) from error
    return run


def _no_run(directory: Path) -> str:
    wanted = f"expected a directory that `lowtide train` wrote, with {METRICS}"
    if not directory.exists():
        return f"there is no directory {directory}; {wanted}."
    if not directory.is_dir():
        return f"{directory} is a file; {wanted}."
    below = sorted(path.parent for path in directory.glob(f"*/{METRICS}"))
    if below:
        names = ", ".join(path.name for path in below[:5])
        return f"{directory} holds no run, but directories of it do: {names}. Name one of them."
    return f"{directory} holds no run; {wanted}."


def _read_settings(run: Run) -> None:
    from lowtide.plain_yaml import load_plain_yaml

    try:
        content = load_plain_yaml((run.directory / SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        run.problems.append(f"there is no {SETTINGS}")
    except (OSError, ValueError):
        run.problems.append(f"{SETTINGS} cannot be read")
    else:
        if isinstance(content, dict):
            run.settings = {str(key): value for key, value in content.items()}
        else:
            run.problems.append(f"{SETTINGS} holds no settings")


class _Rows:
    """Sorts the lines of metrics.jsonl into a run's columns."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.refused = 0

    def take(self, entry: dict[str, Any]) -> None:
        step = number(entry, "step")
        if step is None or not 0 <= step < 2**53 or step != int(step):
            self.refused += 1
        elif "sample" in entry:
            self._sample(int(step), entry["sample"])
        elif "valid_loss" in entry:
            loss = number(entry, "valid_loss")
            if loss is None:
                self.refused += 1
            else:
                self._run.valid.append((int(step), loss))
        elif "loss" in entry:
            self._update(int(step), entry)

    def _update(self, step: int, entry: dict[str, Any]) -> None:
        run = self._run
        if run.steps and step <= run.steps[-1]:
            self._go_back(step)
        count = len(run.steps)
        run.steps.append(step)
        for key in FIGURES:
            value = number(entry, key)
            if value is not None and key not in run.figures:
                run.figures[key] = array("d", [_NAN]) * count
            if key in run.figures:
                run.figures[key].append(_NAN if value is None else value)
        norms = entry.get("grad_norms")
        known = norms[:_LAYERS] if isinstance(norms, list) else []
        while len(run.layers) < len(known):
            run.layers.append(array("d", [_NAN]) * count)
        for layer, column in enumerate(run.layers):
            norm = number({"norm": known[layer]}, "norm") if layer < len(known) else None
            column.append(_NAN if norm is None else norm)

    def _go_back(self, step: int) -> None:
        """An update that was made again: what followed the first time did not stay."""
        run = self._run
        keep = bisect_left(run.steps, step)
        columns: Sequence[array[Any]] = [run.steps, *run.figures.values(), *run.layers]
        for column in columns:
            del column[keep:]
        run.valid = [one for one in run.valid if one[0] < step]
        run.samples = [one for one in run.samples if one.step < step]

    def _sample(self, step: int, sample: Any) -> None:
        if isinstance(sample, dict) and isinstance(sample.get("text"), str):
            prompt = sample.get("prompt")
            self._run.samples.append(SampleRead(step, str(prompt or ""), sample["text"]))
        else:
            self.refused += 1
