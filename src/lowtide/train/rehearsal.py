"""What can be told before a run by making a step or two: `--dry-run`, and the time of an epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from lowtide.config import build
from lowtide.data.files import require_split, resolve_split
from lowtide.data.prepare import PrepareRequest, ask_child
from lowtide.data.sample import Shown
from lowtide.memory.measure import MemoryMeter
from lowtide.memory.plan import PLANNED, predict
from lowtide.methods import get_method
from lowtide.model.adapter import Adapter
from lowtide.model.batch import Batch
from lowtide.model.decoder import Decoder

from .budget import options_of, within_budget, workload
from .history import StepReport
from .loop import Trainer, measured_update
from .order import Indices, RecordOrder, batch_rule, filled
from .settings import StepSettings, TrainSettings

_SAMPLED = 64
_STEPS = 2


@dataclass(frozen=True)
class EpochTime:
    """How long a pass over the data takes, estimated from measured steps.

    Attributes:
        epoch_s: tokens of the pass over the measured tokens per second.
        tokens_per_s: the median step's.
        steps: that were measured, after one that warmed up.
        measured_tokens: of each.
        batches: of the pass.
    """

    epoch_s: float
    tokens_per_s: float
    steps: int
    measured_tokens: int
    batches: int


@dataclass(frozen=True)
class Rehearsal:
    """What `--dry-run` found.

    Attributes:
        shown: the first records.
        predicted_peak_bytes: of the largest batch that the settings allow; None where the method's
            memory is not planned.
        by_kind: the same by what it is for.
        lengths: tokens of each sequence of that batch.
        step: the update that was made, and lost.
    """

    shown: Sequence[Shown]
    predicted_peak_bytes: int | None
    by_kind: Mapping[str, int]
    lengths: tuple[int, ...]
    step: StepReport


def rehearse(
    settings: TrainSettings, model: Decoder, adapter: Adapter, request: PrepareRequest
) -> Rehearsal:
    """Tokenise a sample, plan the memory and make one update, of which nothing is kept.

    Args:
        settings: of the run.
        model: opened with them.
        adapter: as the run would start with it; it is changed.
        request: for the run's data.

    Returns:
        What was found.

    Raises:
        ConfigError: the budget is too small.
        DataError: the sample cannot be used.
        TrainingError: the loss is not finite.
    """
    request = replace(request, sampled=_SAMPLED)
    answer = ask_child("sample", request.to_json(), "records")
    shown = [Shown(**{**one, "runs": [tuple(run) for run in one["runs"]]})
             for one in answer["records"]]  # fmt: skip
    lengths = filled(settings.max_seq_length, settings.max_seq_length * settings.batch_size)
    fitting, guard = within_budget(settings, model, lengths, accumulates=settings.accumulates)
    plan = None
    if settings.method in PLANNED:
        work = workload(settings, model, lengths, settings.accumulates)
        plan = predict(work, options_of(fitting))
    chosen = shown[: settings.batch_size]
    batch = Batch.from_sequences([one.ids for one in chosen], [_labels(one) for one in chosen])
    trainer = Trainer(model, adapter, get_method(settings.method, fitting),
                      replace(settings, iters=settings.iters or 1), guard)  # fmt: skip
    with MemoryMeter() as meter:
        step = measured_update(trainer, [batch], 1, meter)
    return Rehearsal(
        shown,
        None if plan is None else plan.predicted_peak_bytes,
        {} if plan is None else plan.by_kind,
        lengths,
        step,
    )


def has_validation(settings: TrainSettings) -> bool:
    """Whether a run would find validation data.

    Args:
        settings: of the run.

    Returns:
        Whether there is a file, or records are held out.

    Raises:
        DataError: the file that is named is not there.
    """
    data = Path(settings.data).expanduser()
    if settings.valid_data is not None:
        require_split(Path(settings.valid_data).expanduser(), ("valid",))
        return True
    if settings.valid_records:
        return True
    return data.is_dir() and resolve_split(data, "valid") is not None


class RecordLengths:
    """Tokens of each record, as a census wrote them: all that an order needs to know of data."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Args:
            path: 4 bytes for each record, at least one.
        """
        self._lengths = np.memmap(path, dtype=np.uint32, mode="r")

    def __len__(self) -> int:
        """Number of records."""
        return len(self._lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest record."""
        return int(self._lengths.max())

    def lengths_of(self, indices: Indices) -> Indices:
        """Tokens of each of these records."""
        return self._lengths[indices].astype(np.int64)

    def counts(self) -> dict[int, int]:
        """How many records have how many tokens."""
        values, counts = np.unique(self._lengths, return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))


def time_epoch(settings: StepSettings, model: Decoder, lengths: RecordLengths) -> EpochTime:
    """Measure steps on random tokens, as long as the records are.

    Args:
        settings: of the step and its batches.
        model: opened with them.
        lengths: of the records.

    Returns:
        The estimate.

    Raises:
        ConfigError: the budget is too small.
    """
    known = {name: value for name, value in asdict(settings).items() if name in _shared_names()}
    run = build(TrainSettings, {**known, "data": "-", "adapter_path": "-", "iters": 1})
    order, counts = RecordOrder(lengths, batch_rule(run)), lengths.counts()
    if run.packing:
        chosen = tuple(lengths.lengths_of(np.array(order.take())).tolist())
    else:
        chosen = _spread(counts, run.batch_size)
    fitting, guard = within_budget(run, model, chosen)
    adapter = Adapter.create(model, run.lora_config(model.spec), 0, run.rounded_dtype)
    trainer = Trainer(model, adapter, get_method(run.method, fitting), run, guard)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(model.spec.vocab_size, (n,), generator=generator).tolist()
            for n in chosen]  # fmt: skip
    batch = Batch.from_sequences(rows)
    with MemoryMeter() as meter:
        made = [measured_update(trainer, [batch], n + 1, meter) for n in range(1 + _STEPS)]
    rate = median(one.tokens_per_s for one in made[1:])
    tokens = sum(length * count for length, count in counts.items())
    return EpochTime(tokens / rate, rate, _STEPS, sum(chosen), order.batches_in(0))


def _spread(lengths: Mapping[int, int], count: int) -> tuple[int, ...]:
    """Lengths at the middles of `count` equal shares of the records; of one, their mean."""
    total = sum(lengths.values())
    if count == 1:
        mean = sum(length * n for length, n in lengths.items()) / total
        return (max(2, round(mean)),)
    chosen: list[int] = []
    seen = 0
    for length in sorted(lengths):
        seen += lengths[length]
        while len(chosen) < count and seen >= (len(chosen) + 0.5) / count * total:
            chosen.append(max(2, length))
    return tuple(chosen)


def _shared_names() -> set[str]:
    return set(TrainSettings.__dataclass_fields__)


def _labels(one: Shown) -> list[int]:
    return [token if flag else -100 for token, flag in zip(one.ids, one.trained, strict=True)]


def finished(rehearsal: Rehearsal) -> dict[str, Any]:
    """The rehearsal as JSON can hold it, without its texts' ids."""
    first = [{"tokens": len(one.ids), "trained": sum(one.trained[1:]), "runs": one.runs}
             for one in rehearsal.shown[:3]]  # fmt: skip
    return {
        "predicted_peak_bytes": rehearsal.predicted_peak_bytes,
        "by_kind": dict(rehearsal.by_kind),
        "step": asdict(rehearsal.step),
        "sample": first,
    }
