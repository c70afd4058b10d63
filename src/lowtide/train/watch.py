"""Everybody who is told of a run: its record, whoever looks on, and what follows from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from lowtide.data.prepare import PrepareReport, SplitReport
from lowtide.data.prompts import Interpreter
from lowtide.environment import environment
from lowtide.runs.processes import process_identity
from lowtide.weights.checkpoint import dtype_name

from .history import TrainResult
from .loop import Trainer
from .manners import Manners
from .observers import RunObserver, Several
from .output import METRICS_FILE
from .record import Recorder
from .run_dir import RunDir
from .samples import Sampler
from .trackers import TRACKERS, wanted_trackers


class Watchers(Several):
    """All observers of a run, its recorder first."""

    def __init__(self, recorder: Recorder, others: list[RunObserver]) -> None:
        """Nobody is told anything yet.

        Args:
            recorder: knows what the run costs.
            others: told after it; more may be added.
        """
        super().__init__(others)
        self._recorder = recorder

    def _tell(self, what: str, *facts: Any) -> None:
        getattr(self._recorder, what)(*facts)
        super()._tell(what, *facts)

    def end(self, result: TrainResult) -> None:
        """Tell all that the run is over.

        Args:
            result: what it did.
        """
        self.on_end(result, self._recorder.cost())


@contextmanager
def watched(
    run_dir: RunDir, trainer: Trainer, data: PrepareReport, observer: RunObserver
) -> Iterator[Watchers]:
    """Keep a run's record while it goes on.

    Args:
        run_dir: takes the files.
        trainer: of the run.
        data: what was tokenised.
        observer: who looks on.

    Yields:
        Whom to tell of the run.
    """
    settings = trainer.settings
    trackers = [
        TRACKERS[name](run_dir, asdict(settings)) for name in wanted_trackers(settings.report_to)
    ]
    recorder = Recorder(run_dir.log, _facts(trainer, data), trackers)
    if settings.resume:
        recorder.go_on_from(run_dir.directory / METRICS_FILE)
    others: list[RunObserver] = [observer]
    watchers = Watchers(recorder, others)
    sampler = None
    if settings.sample_prompt:
        tokenizer = settings.tokenizer_directory(trainer.model.directory)
        interpreter = Interpreter(tokenizer, settings.chat_template)
        sampler = Sampler(trainer, interpreter, watchers.on_sample)
        others.append(sampler)
    manners = Manners(settings, watchers.on_pause, trainer)
    others.append(manners)  # last: a pause comes after all that an update leads to
    with recorder:
        manners.pause()
        if sampler is not None and not settings.resume:
            sampler.answer(0)
        yield watchers


def _facts(trainer: Trainer, data: PrepareReport) -> dict[str, Any]:
    """What events.jsonl says of the start."""
    model, adapter = trainer.model, trainer.adapter
    return {
        "process": process_identity(os.getpid()),
        "machine": environment(),
        "model": {
            "directory": str(model.path),
            "model_type": model.spec.model_type,
            "n_parameters": model.spec.n_parameters,
            "num_layers": model.spec.num_layers,
            "stored_dtypes": model.stored_dtypes,
            "compute_dtype": dtype_name(model.compute_dtype),
            "bytes_on_disk": model.checkpoint.nbytes,
        },
        "iters": trainer.settings.iters,
        "adapter": {"n_parameters": adapter.n_parameters, "modules": list(adapter.modules)},
        "data": {name: _split(split) for name, split in data.splits.items()},
        "data_warnings": list(data.warnings),
        **({} if trainer.guard is None else {"memory_budget_bytes": trainer.guard.budget_bytes}),
    }


def _split(split: SplitReport) -> dict[str, Any]:
    facts = asdict(split)
    del facts["path"]  # of a cache that is gone after the run
    return {**facts, "source": str(split.source)}
