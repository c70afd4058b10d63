"""The training loop: batches in, updates, validations and saves out."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from lowtide.errors import BudgetError, ModelError, OutputError, TrainingError
from lowtide.infer.evaluate import Evaluation, Sequences, batch_of, evaluate
from lowtide.memory.measure import MemoryMeter, read_from_disk
from lowtide.methods import GradSink, Method, Step
from lowtide.methods.base import require_finite
from lowtide.model.adapter import Adapter
from lowtide.model.batch import Batch
from lowtide.model.decoder import Decoder

from .budget import Guard
from .optim import OPTIMIZERS
from .order import RecordOrder, batch_rule, largest_batch
from .run_dir import RunDir
from .schedule import DEFAULT_ITERS, Schedule
from .settings import TrainSettings
from .sink import Norms, updater
from .stopping import EarlyStopping


@dataclass(frozen=True)
class StepReport:
    """One update, as progress shows it and metrics.jsonl keeps it."""

    step: int
    loss: float
    n_tokens: int
    wall_s: float
    cpu_s: float
    tokens_per_s: float
    peak_anon_bytes: int
    peak_rss_bytes: int
    peak_file_bytes: int
    disk_read_bytes: int
    learning_rate: float
    grad_norm: float
    grad_norms: list[float | None]


@dataclass(frozen=True)
class TrainResult:
    """What a finished run did."""

    steps: int
    loss: float
    valid_loss: float | None
    n_tokens: int
    wall_s: float
    cpu_s: float
    peak_anon_bytes: int
    peak_rss_bytes: int
    interrupted: bool = False
    stopped_early: bool = False


class Update(NamedTuple):
    """What one update was: the mean loss before it, its rate, its gradients' norms unclipped."""

    loss: float
    learning_rate: float
    norms: Norms


class Observer(Protocol):
    """Told of what happens: it keeps the metrics, and draws progress."""

    def on_step(self, report: StepReport) -> None:
        """An update was made."""

    def on_valid(self, step: int, result: Evaluation) -> None:
        """A validation was made after `step` updates."""

    def on_save(self, step: int) -> None:
        """The adapter of `step` is on disk."""


class Trainer:
    """One run over a data set."""

    def __init__(
        self,
        model: Decoder,
        adapter: Adapter,
        method: Method,
        settings: TrainSettings,
        guard: Guard | None = None,
    ) -> None:
        """Set up the optimiser and the way of updating that the settings ask for.

        Args:
            model: frozen.
            adapter: trained in place.
            method: gives the gradients.
            settings: of the run; `iters` says how many updates it has.
            guard: keeps watch over a memory budget.

        Raises:
            ConfigError: the schedule or the groups do not fit the run.
        """
        self.model, self.adapter, self.method, self.settings = model, adapter, method, settings
        self._guard = guard
        self.iters = settings.iters or DEFAULT_ITERS
        self._schedule = Schedule.of(settings, self.iters)
        self._optimizer = OPTIMIZERS[settings.optimizer](settings, adapter.parameters)
        self._updater = updater(settings, adapter.parameters, self._optimizer)
        self._stopping = EarlyStopping.of(settings)
        self._stop_requested = self._updating = False

    @property
    def budget_bytes(self) -> int | None:
        """What `--memory-budget` allows."""
        return None if self._guard is None else self._guard.budget_bytes

    def request_stop(self) -> bool:
        """End the run after the update that is being made, with its adapter saved.

        Returns:
            Whether an update is being made; if not, there is nothing to wait for.
        """
        self._stop_requested = True
        return self._updating

    def reserve(self, lengths: Sequence[int]) -> None:
        """Make the method's buffers for batches of up to these lengths, if the budget allows them.

        Args:
            lengths: tokens of each sequence of the largest batch.

        Raises:
            BudgetError: they need more than the budget, or than is free.
        """
        if self._guard is not None:
            self._guard.admit(lengths)
        self.method.reserve(self.model, sum(lengths), max(lengths))

    def update(self, batches: list[Batch], step: int) -> Update:
        """One optimiser update from micro-batches, each token weighing the same.

        Args:
            batches: micro-batches of this update.
            step: its number, from 1; decides the learning rate and seeds the dropout.

        Returns:
            The mean loss per labelled token before the update, the rate and the norms.

        Raises:
            TrainingError: a loss or gradient is not finite; the parameters of a non-finite loss
                are as they were before this update.
            BudgetError: a batch needs more than the budget, or than is free; nothing was done.
            ModelError: a weight file changed since the model was loaded.
        """
        if self._guard is not None:
            for lengths in {batch.lengths for batch in batches}:
                self._guard.admit(lengths)
        n_tokens = sum(batch.n_tokens for batch in batches)

        def run(sink: GradSink) -> float:
            total = 0.0
            for number, batch in enumerate(batches):
                seed = (self.settings.seed * 1_000_003 + step) * 1_009 + number
                one = Step(1.0 / n_tokens, seed, step - 1, seed)
                total += self.method.step(self.model, self.adapter, batch, sink, one)
            return total

        rate = self._schedule.rate(step)
        self._optimizer.start(step, rate)
        total, norms = self._updater.update(run)
        self.model.checkpoint.check_unchanged()  # before anything of this update is kept
        return Update(total / n_tokens, rate, norms)

    def run(
        self,
        train: Sequences,
        valid: Sequences | None,
        run_dir: RunDir,
        observer: Observer,
    ) -> TrainResult:
        """Train for `iters` updates, validating and saving on the way.

        Args:
            train: sequences to learn.
            valid: sequences to validate on, or None.
            run_dir: takes the adapter and the metrics.
            observer: told of every step.

        Returns:
            A summary; `interrupted` is set when Ctrl-C ended the run and the adapter was saved.

        Raises:
            TrainingError: a loss or gradient was not finite, the disk is full, or a weight file
                changed; the last good adapter is on disk.
        """
        history = _History()
        run = _Run(train, valid, run_dir, observer, history)
        try:
            run_dir.save(self.adapter, 0)
            with MemoryMeter() as meter:
                try:
                    self._steps(run, meter)
                except KeyboardInterrupt:
                    history.interrupted = True
                self._finish(run)
        except (TrainingError, OutputError, ModelError) as error:
            if isinstance(error, TrainingError) and not isinstance(error, BudgetError):
                run_dir.roll_back()
            raise TrainingError(
                f"training stopped at step {history.steps + 1}: {error} {_kept(run_dir)}"
            ) from error
        return history.result()

    def _steps(self, run: _Run, meter: MemoryMeter) -> None:
        train, valid, run_dir, observer, history = run
        s = self.settings
        order = RecordOrder(train, batch_rule(s))
        self.reserve(largest_batch(s, train, valid))
        self._validate(run, 0)
        for step in range(1, self.iters + 1):
            micro = [order.take() for _ in range(s.grad_accumulation_steps)]
            batches = [batch_of(train, chosen) for chosen in micro]
            self._updating = True
            report = measured_update(self, batches, step, meter)
            history.add(report, batches[-1])
            self._updating = False
            run_dir.confirm()
            observer.on_step(report)
            if self._guard is not None:
                self._guard.check(report.peak_anon_bytes)
            if self._stop_requested:
                raise KeyboardInterrupt
            if step % s.steps_per_eval == 0 or step == self.iters:
                self._validate(run, step)
                if self._stopping.due and step < self.iters:
                    history.stopped_early = True
                    return
            if step % s.save_every == 0 and step < self.iters:
                run_dir.save(self.adapter, step)
                observer.on_save(step)

    def _finish(self, run: _Run) -> None:
        """Save what the last update made, and see that its loss is finite too."""
        history, run_dir = run.history, run.run_dir
        if history.last is None:
            return
        run_dir.save(self.adapter, history.steps)
        if history.validated_step != history.steps:
            require_finite(torch.tensor(self.method.loss(self.model, self.adapter, history.last)))
        run_dir.confirm()
        run.observer.on_save(history.steps)

    def _validate(self, run: _Run, step: int) -> None:
        if run.valid is None:
            return
        s = self.settings
        result = evaluate(
            self.model, self.adapter, run.valid, self.method,
            batch_size=s.batch_size, max_batches=s.val_batches,
        )  # fmt: skip
        run.history.valid_loss, run.history.validated_step = result.loss, step
        self._stopping.see(result.loss)
        run.observer.on_valid(step, result)


def measured_update(
    trainer: Trainer, batches: list[Batch], step: int, meter: MemoryMeter
) -> StepReport:
    """One update, with its time and its peak of memory."""
    meter.take()
    wall, cpu, read = time.perf_counter(), sum(os.times()[:2]), read_from_disk()
    update = trainer.update(batches, step)
    wall, cpu = time.perf_counter() - wall, sum(os.times()[:2]) - cpu
    peak = meter.take()
    return StepReport(
        step=step,
        loss=update.loss,
        n_tokens=sum(batch.n_tokens for batch in batches),
        wall_s=wall,
        cpu_s=cpu,
        tokens_per_s=sum(len(batch.ids) for batch in batches) / max(wall, 1e-9),
        peak_anon_bytes=peak.anon_bytes,
        peak_rss_bytes=peak.rss_bytes,
        peak_file_bytes=peak.file_bytes,
        disk_read_bytes=read_from_disk() - read,
        learning_rate=update.learning_rate,
        grad_norm=update.norms.total,
        grad_norms=[None if n is None else float(f"{n:.4g}") for n in update.norms.by_layer],
    )


def _kept(run_dir: RunDir) -> str:
    """What a run that had to stop leaves behind."""
    if run_dir.step_in_place is None:
        return f"Nothing was written to {run_dir.directory}."
    return f"The adapter in {run_dir.directory} is that of step {run_dir.step_in_place}."


class _History:
    """Sums over the steps made so far."""

    def __init__(self) -> None:
        self.steps = 0
        self.interrupted = self.stopped_early = False
        self.last: Batch | None = None
        self.valid_loss: float | None = None
        self.validated_step: int | None = None
        self._loss = math.nan
        self._tokens = 0
        self._wall = self._cpu = 0.0
        self._anon = self._rss = 0

    def add(self, report: StepReport, batch: Batch) -> None:
        self.steps, self._loss, self.last = report.step, report.loss, batch
        self._tokens += report.n_tokens
        self._wall += report.wall_s
        self._cpu += report.cpu_s
        self._anon = max(self._anon, report.peak_anon_bytes)
        self._rss = max(self._rss, report.peak_rss_bytes)

    def result(self) -> TrainResult:
        return TrainResult(
            self.steps, self._loss, self.valid_loss, self._tokens, self._wall, self._cpu,
            self._anon, self._rss, self.interrupted, self.stopped_early,
        )  # fmt: skip


class _Run(NamedTuple):
    """What the parts of one run share."""

    train: Sequences
    valid: Sequences | None
    run_dir: RunDir
    observer: Observer
    history: _History
