"""The training loop: batches in, updates, validations and saves out."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from time import monotonic
from typing import NamedTuple, Protocol

import torch

from lowtide.errors import BudgetError, ModelError, OutputError, TrainingError
from lowtide.export.peft import WEIGHTS_FILE
from lowtide.infer.evaluate import Evaluation, Sequences, batch_of, evaluate
from lowtide.memory.measure import MemoryMeter, read_from_disk
from lowtide.methods import GradSink, Method, Step
from lowtide.methods.base import require_finite
from lowtide.model.adapter import Adapter
from lowtide.model.batch import Batch
from lowtide.model.decoder import Decoder
from lowtide.model.neftune import Noise

from .budget import Guard
from .checkpoints import OPTIMIZER_FILE, Checkpoint
from .history import History, StepReport, TrainResult
from .optim import OPTIMIZERS
from .order import RecordOrder, batch_rule, largest_batch
from .run_dir import RunDir
from .schedule import DEFAULT_ITERS, Schedule
from .settings import TrainSettings
from .sink import Norms, updater
from .stop import Stop
from .stopping import EarlyStopping


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
        """A checkpoint of `step` is on disk."""


class Trainer:
    """One run over a data set."""

    def __init__(
        self,
        model: Decoder,
        adapter: Adapter,
        method: Method,
        settings: TrainSettings,
        guard: Guard | None = None,
        stop: Stop | None = None,
    ) -> None:
        """Set up the optimiser and the way of updating that the settings ask for.

        Args:
            model: frozen.
            adapter: trained in place.
            method: gives the gradients.
            settings: of the run; `iters` says how many updates it has.
            guard: keeps watch over a memory budget.
            stop: hears signals.

        Raises:
            ConfigError: the schedule or the groups do not fit the run.
        """
        self.model, self.adapter, self.method, self.settings = model, adapter, method, settings
        self.guard, self.stop = guard, stop or Stop()
        self._meter = MemoryMeter()
        self.iters = settings.iters or DEFAULT_ITERS
        self._schedule = Schedule.of(settings, self.iters)
        self._optimizer = OPTIMIZERS[settings.optimizer](settings, adapter.parameters)
        self._updater = updater(settings, adapter.parameters, self._optimizer)
        self._stopping = EarlyStopping.of(settings)
        self.history = History()
        self._order: dict[str, int] | None = None
        """Where in the order of the records the last update ended; None at the start."""
        self._first = 1
        self._whole = True
        """Whether the parameters are those of `history.step`: not while an update is made."""

    def rest(self, resting: bool) -> None:
        """While the run pauses, hold little and do nothing; the next update makes what it needs."""
        self.method.release()
        self._meter.rest(resting)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Become what the trainer was when it wrote a checkpoint.

        Args:
            checkpoint: of a run with the same settings.

        Raises:
            OutputError: its tensors are others.
        """
        checkpoint.load(self.adapter.parameters, WEIGHTS_FILE)
        checkpoint.load(self._optimizer.state(), OPTIMIZER_FILE)
        self.history = History(**checkpoint.state.history)
        self.history.stopped_early = False
        self._stopping.go_on(self.history.stopping)
        self._order = checkpoint.state.order
        self._first = checkpoint.state.step + 1

    def reserve(self, lengths: Sequence[int]) -> None:
        """Make the method's buffers for batches of up to these lengths, if the budget allows them.

        Args:
            lengths: tokens of each sequence of the largest batch.

        Raises:
            BudgetError: they need more than the budget, or than is free.
        """
        if self.guard is not None:
            self.guard.admit(lengths)
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
        if self.guard is not None:
            for lengths in {batch.lengths for batch in batches}:
                self.guard.admit(lengths)
        n_tokens = sum(batch.n_tokens for batch in batches)

        def run(sink: GradSink) -> float:
            total = 0.0
            for number, batch in enumerate(batches):
                seed = (self.settings.seed * 1_000_003 + step) * 1_009 + number
                one = Step(1.0 / n_tokens, seed, step - 1, seed, noise_of(self.settings, seed))
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
        order = RecordOrder(train, batch_rule(self.settings))
        if self._order is not None:
            order.seek(self._order)
        self._order = order.position()
        run = _Run(train, valid, run_dir, observer, order)
        interrupted = False
        try:
            with self._meter as meter:
                try:
                    self._steps(run, meter)
                except KeyboardInterrupt:
                    interrupted = True
                self._finish(run)
        except (TrainingError, OutputError, ModelError) as error:
            if isinstance(error, TrainingError) and not isinstance(error, BudgetError):
                run_dir.roll_back()
            raise TrainingError(
                f"training stopped at step {self.history.step + 1}: {error} {_kept(run_dir)}"
            ) from error
        return self.history.result(interrupted, run_dir.step_in_place)

    def _steps(self, run: _Run, meter: MemoryMeter) -> None:
        train, valid, run_dir, observer, _ = run
        s = self.settings
        self.reserve(largest_batch(s, train, valid))
        if run_dir.saved_step is None:
            self._validate(run)
            self._save(run)
        elif self._validation_due(self._first - 1) and self._validate(run):
            run_dir.keep_best()  # the run was interrupted before it could know
            run_dir.confirm()
        saved = monotonic()
        for step in range(self._first, self.iters + 1):
            if self._stopping.due:
                self.history.stopped_early = True
                return
            with self.stop.shielded():
                with self.stop.shielded(update=True):
                    report = self._update(run, step, meter)
                run_dir.confirm()
                observer.on_step(report)
                if self.guard is not None:
                    self.guard.check(report.peak_anon_bytes)
            self.stop.check()
            best = self._validation_due(step) and self._validate(run)
            late = s.save_minutes is not None and monotonic() - saved >= 60 * s.save_minutes
            if (best or late or step % s.save_every == 0) and step < self.iters:
                self._save(run)
                observer.on_save(step)
                saved = monotonic()

    def _update(self, run: _Run, step: int, meter: MemoryMeter) -> StepReport:
        s = self.settings
        self._whole = False
        micro = [run.order.take() for _ in range(s.grad_accumulation_steps)]
        batches = [batch_of(run.train, chosen) for chosen in micro]
        report = measured_update(self, batches, step, meter)
        self.history.add(report)
        self._last, self._order = batches[-1], run.order.position()
        self._whole = True
        return report

    def _save(self, run: _Run) -> None:
        with self.stop.shielded():
            self._write(run)
        self.stop.check()

    def _write(self, run: _Run) -> None:
        assert self._order is not None, "set where the run began"
        state = self._optimizer.state()
        run.run_dir.save(self.adapter, state, self._order, self.history)

    def _finish(self, run: _Run) -> None:
        """Save what the last update made, and see that its loss is finite too."""
        history, run_dir = self.history, run.run_dir
        if not self._whole or history.step < self._first:
            return
        with self.stop.shielded():
            if run_dir.saved_step != history.step:
                self._write(run)
            if history.validated_step != history.step:
                loss = self.method.loss(self.model, self.adapter, self._last)
                require_finite(torch.tensor(loss))
            run_dir.confirm()
        run.observer.on_save(history.step)

    def _validation_due(self, step: int) -> bool:
        if self.history.validated_step == step:
            return False
        return step % self.settings.steps_per_eval == 0 or step == self.iters

    def _validate(self, run: _Run) -> bool:
        """Validate the parameters as they are; whether they are the best so far."""
        if run.valid is None:
            return False
        s = self.settings
        result = evaluate(
            self.model, self.adapter, run.valid, self.method,
            batch_size=s.batch_size, max_batches=s.val_batches,
        )  # fmt: skip
        step = self.history.step
        with self.stop.shielded():
            best = self.history.validated(result.loss)
            self._stopping.see(result.loss)
            self.history.stopping = self._stopping.state()
            run.observer.on_valid(step, result)
        self.stop.check()
        return best


def noise_of(settings: TrainSettings, seed: int) -> Noise | None:
    """NEFTune's noise of a micro-batch, whose seed is mixed so that dropout's is another."""
    alpha = settings.neftune_noise_alpha
    return None if alpha is None else Noise(alpha, (seed * 0x9E3779B1 + 1) & (1 << 62) - 1)


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
    if run_dir.resumable_step is None:
        return f"Nothing was written to {run_dir.directory}."
    kept = f"Go on from step {run_dir.resumable_step} with --resume."
    if run_dir.step_in_place is None:
        return kept
    return f"The adapter in {run_dir.directory} is that of step {run_dir.step_in_place}. {kept}"


class _Run(NamedTuple):
    """What the parts of one run share."""

    train: Sequences
    valid: Sequences | None
    run_dir: RunDir
    observer: Observer
    order: RecordOrder
