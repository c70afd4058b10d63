"""The same training by transformers, peft, torch.optim and transformers' schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import file_name, hf_model
from torch import Tensor

import lowtide as lt
from lowtide.train.loop import Trainer, Update

MakeOptimizer = Callable[..., torch.optim.Optimizer]


@dataclass
class Recording:
    """What a run of ours did: where it began, its batches, and each update."""

    start: dict[str, Tensor] = field(default_factory=dict)
    batches: list[list[lt.Batch]] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """Of each update."""
        return [update.loss for update in self.updates]


@contextmanager
def recorded() -> Iterator[Recording]:
    """Keep what the next run does."""
    held, usual = Recording(), Trainer.update

    def update(self: Trainer, batches: list[lt.Batch], step: int) -> Update:
        if not held.start:
            held.start = {name: p.clone() for name, p in self.adapter.items()}
        held.batches.append(batches)
        held.updates.append(usual(self, batches, step))
        return held.updates[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", update)
        yield held


@dataclass(frozen=True)
class Peer:
    """How the other side trains.

    Attributes:
        optimizer: a class of torch.optim, or what stands in for one.
        options: for it; `lr` is the peak.
        schedule: transformers' name.
        warmup: its updates.
        max_grad_norm: for torch's clipping, or None.
        loraplus: B's rate over A's.
    """

    optimizer: MakeOptimizer
    options: Mapping[str, Any]
    schedule: str
    warmup: int
    max_grad_norm: float | None = None
    loraplus: float = 1.0

    def losses(self, model: Path, adapter: Path, run: Recording) -> list[float]:
        """The mean loss per labelled token before each update, on the same batches.

        Args:
            model: directory of the frozen model.
            adapter: directory of an adapter of the right shape; its values are not used.
            run: ours.

        Returns:
            As many losses as the run has updates.
        """
        from peft import PeftModel
        from transformers import get_scheduler

        peft = PeftModel.from_pretrained(hf_model(model, torch.float32), adapter, is_trainable=True)
        trained = {file_name(name): p for name, p in peft.named_parameters() if p.requires_grad}
        assert trained.keys() == run.start.keys()
        for name, p in trained.items():
            p.data.copy_(run.start[name])
        ratios = {"lora_A": 1.0, "lora_B": self.loraplus, "lora_magnitude": self.loraplus}
        groups = [
            {
                "params": [p for name, p in trained.items() if part in name],
                "lr": self.options["lr"] * ratio,
            }
            for part, ratio in ratios.items()
            if any(part in name for name in trained)
        ]
        optimizer = self.optimizer(groups, **self.options)
        schedule = get_scheduler(self.schedule, optimizer, self.warmup, len(run.batches))
        losses = []
        for batches in run.batches:
            count = sum(batch.n_tokens for batch in batches)
            total = 0.0
            for batch in batches:
                loss = summed_loss(peft, batch) / count
                loss.backward()
                total += float(loss.detach())
            losses.append(total)
            if self.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(trained.values(), self.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return losses


def summed_loss(model: Any, batch: lt.Batch) -> Tensor:
    """Of the labelled tokens, of sequences padded on the right."""
    rows = torch.split(batch.ids, list(batch.lengths))
    targets = torch.split(batch.targets, list(batch.lengths))
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    wanted = torch.nn.utils.rnn.pad_sequence(list(targets), True, padding_value=-100)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")


def worst(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference of two curves."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
