"""Who is told of a run while it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lowtide.data.prepare import PrepareReport
from lowtide.infer.evaluate import Evaluation
from lowtide.model.adapter import Adapter
from lowtide.model.decoder import Decoder

from .history import StepReport, TrainResult
from .loop import Observer
from .resume import Resumption

if TYPE_CHECKING:
    from .rehearsal import Rehearsal


@dataclass(frozen=True)
class Sample:
    """What the model with its adapter made of a prompt, after `step` updates."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Cost:
    """What a run took.

    Attributes:
        elapsed_s: by the clock, all its sittings together, pauses included.
        paused_s: in pauses, in this sitting.
        cpu_s: of this process and its children, in this sitting.
        energy_j: of the processor packages in this sitting, others' work included; None where the
            system does not tell.
    """

    elapsed_s: float
    paused_s: float
    cpu_s: float
    energy_j: float | None


class RunObserver(Observer, Protocol):
    """An observer that also hears of what lies around the updates."""

    def on_model(self, model: Decoder, adapter: Adapter) -> None:
        """The model is mapped and the adapter made."""

    def on_data(self, report: PrepareReport) -> None:
        """The data is tokenised."""

    def on_resume(self, resumption: Resumption) -> None:
        """The run goes on from a checkpoint."""

    def on_start(self, iters: int, budget_bytes: int | None) -> None:
        """Training begins, and will make up to so many updates in all, within a budget or none."""

    def on_rehearsal(self, rehearsal: Rehearsal) -> None:
        """`--dry-run` is over."""

    def on_sample(self, sample: Sample) -> None:
        """A prompt was answered."""

    def on_pause(self, reason: str | None) -> None:
        """The run pauses for a reason, or with None goes on."""

    def on_stopping(self) -> None:
        """A signal to end was heard; the update being made is finished first."""

    def on_end(self, result: TrainResult, cost: Cost) -> None:
        """The run is over, finished or interrupted; one that failed raises instead."""


class Quiet:
    """An observer that says nothing."""

    def on_model(self, model: Decoder, adapter: Adapter) -> None:
        """Nothing."""

    def on_data(self, report: PrepareReport) -> None:
        """Nothing."""

    def on_start(self, iters: int, budget_bytes: int | None) -> None:
        """Nothing."""

    def on_step(self, report: StepReport) -> None:
        """Nothing."""

    def on_valid(self, step: int, result: Evaluation) -> None:
        """Nothing."""

    def on_save(self, step: int) -> None:
        """Nothing."""

    def on_resume(self, resumption: Resumption) -> None:
        """Nothing."""

    def on_rehearsal(self, rehearsal: Rehearsal) -> None:
        """Nothing."""

    def on_sample(self, sample: Sample) -> None:
        """Nothing."""

    def on_pause(self, reason: str | None) -> None:
        """Nothing."""

    def on_stopping(self) -> None:
        """Nothing."""

    def on_end(self, result: TrainResult, cost: Cost) -> None:
        """Nothing."""


class Several(Quiet):
    """Tells several observers, in their order."""

    def __init__(self, observers: Sequence[RunObserver]) -> None:
        """Nobody is told anything yet.

        Args:
            observers: the first is told first.
        """
        self._observers = observers

    def on_step(self, report: StepReport) -> None:
        """Pass it on."""
        self._tell("on_step", report)

    def on_valid(self, step: int, result: Evaluation) -> None:
        """Pass it on."""
        self._tell("on_valid", step, result)

    def on_save(self, step: int) -> None:
        """Pass it on."""
        self._tell("on_save", step)

    def on_sample(self, sample: Sample) -> None:
        """Pass it on."""
        self._tell("on_sample", sample)

    def on_pause(self, reason: str | None) -> None:
        """Pass it on."""
        self._tell("on_pause", reason)

    def on_stopping(self) -> None:
        """Pass it on."""
        self._tell("on_stopping")

    def on_end(self, result: TrainResult, cost: Cost) -> None:
        """Pass it on."""
        self._tell("on_end", result, cost)

    def _tell(self, what: str, *facts: Any) -> None:
        for observer in self._observers:
            getattr(observer, what)(*facts)
