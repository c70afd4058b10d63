"""What a run leaves for those who look at it later: metrics.jsonl and events.jsonl.

metrics.jsonl has the figures: a line per update, validation and sample. events.jsonl has what
happened: the start with machine, model and data, pauses, warnings, the end. docs/metrics.md names
every key.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowtide.device import EnergyMeter, Paced, temperature_c
from lowtide.errors import LowtideWarning, OutputError
from lowtide.infer.evaluate import Evaluation
from lowtide.runs.lines import Lines, finite, number

from .history import StepReport, TrainResult
from .observers import Cost, Quiet, Sample
from .output import EVENTS_FILE, METRICS_FILE
from .trackers import Tracker

_SENSORS_S = 5.0
Write = Callable[[Mapping[str, object], str], None]


class Recorder(Quiet):
    """Writes both files of a run. Use as a context manager around its steps."""

    def __init__(
        self, write: Write, facts: Mapping[str, Any], trackers: Sequence[Tracker] = ()
    ) -> None:
        """Nothing is written yet.

        Args:
            write: appends an entry to a file of the run.
            facts: of the start: machine, model, data.
            trackers: told of every metrics line.
        """
        self._write, self._facts, self._trackers = write, facts, list(trackers)
        self._temperature = Paced(temperature_c, _SENSORS_S)
        energy = EnergyMeter()
        self._energy = Paced(energy.joules, _SENSORS_S)
        self._started, self._tokens, self._step = time.monotonic(), 0, 0
        self._paused_s, self._paused_at = 0.0, 0.0
        self._ended = False

    def go_on_from(self, metrics: Path) -> None:
        """Count tokens and time on from what an earlier sitting recorded.

        Args:
            metrics: its metrics.jsonl.
        """
        elapsed = 0.0
        for entry in Lines(metrics):
            if "loss" in entry:
                self._step = int(number(entry, "step") or self._step)
                self._tokens = int(number(entry, "total_tokens") or self._tokens)
                elapsed = number(entry, "elapsed_s") or elapsed
        self._started -= elapsed

    def __enter__(self) -> Recorder:
        """Write the start, and from now on every warning of ours."""
        self._usual = warnings.showwarning
        warnings.showwarning = self._show_warning
        self._event("start", **self._facts)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """Write how it ended, where `on_end` was not reached."""
        warnings.showwarning = self._usual
        if not self._ended:
            interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
            with contextlib.suppress(OutputError):  # the disk may be why
                self._end("interrupted" if interrupted else "failed", error=str(error))
        for tracker in self._trackers:
            with self._harmless(tracker):
                tracker.close()

    def on_step(self, report: StepReport) -> None:
        """A line of metrics.jsonl."""
        self._step = report.step
        self._tokens += report.n_tokens
        self._energy()
        more: dict[str, Any] = {"total_tokens": self._tokens, "elapsed_s": self._elapsed()}
        if (heat := self._temperature()) is not None:
            more["temperature_c"] = heat
        self._metrics({**asdict(report), **more})

    def on_valid(self, step: int, result: Evaluation) -> None:
        """A line of metrics.jsonl."""
        self._metrics({"step": step, "valid_loss": result.loss, "n_tokens": result.n_tokens})

    def on_sample(self, sample: Sample) -> None:
        """A line of metrics.jsonl."""
        told = {"prompt": sample.prompt, "text": sample.text}
        self._metrics({"step": sample.step, "sample": told})

    def on_pause(self, reason: str | None) -> None:
        """An event."""
        if reason is not None:
            self._paused_at = time.monotonic()
            self._event("paused", reason=reason)
            return
        paused = time.monotonic() - self._paused_at
        self._paused_s += paused
        self._event("went on", paused_s=round(paused, 3))

    def on_end(self, result: TrainResult, cost: Cost) -> None:
        """The last event."""
        self._end("interrupted" if result.interrupted else "finished")

    def cost(self) -> Cost:
        """What the run has taken so far."""
        return Cost(self._elapsed(), self._paused_s, sum(os.times()[:4]), self._energy())

    def _elapsed(self) -> float:
        return round(time.monotonic() - self._started, 3)

    def _end(self, state: str, **more: Any) -> None:
        self._ended = True
        self._event("end", state=state, **asdict(self.cost()), **more)

    def _event(self, event: str, **facts: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"event": event, "step": self._step, "time": now, **facts}
        self._write(finite(entry), EVENTS_FILE)

    def _metrics(self, entry: Mapping[str, Any]) -> None:
        self._write(finite(entry), METRICS_FILE)
        for tracker in list(self._trackers):
            with self._harmless(tracker):
                tracker.log(entry)

    @contextlib.contextmanager
    def _harmless(self, tracker: Tracker) -> Iterator[None]:
        """A tracker that fails is left out from then on; the run goes on."""
        try:
            yield
        except Exception as error:
            if tracker in self._trackers:
                self._trackers.remove(tracker)
            warnings.warn(
                f"{tracker.name} failed and is told nothing more: {type(error).__name__}: {error}",
                LowtideWarning,
                stacklevel=2,
            )

    def _show_warning(
        self, message: Warning | str, category: type[Warning], *place: Any, **more: Any
    ) -> None:
        if issubclass(category, LowtideWarning):
            with contextlib.suppress(OutputError):
                self._event("warning", message=str(message))
        self._usual(message, category, *place, **more)
