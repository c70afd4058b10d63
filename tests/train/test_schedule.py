"""Learning rates against transformers' schedulers and torch's, and the length of a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lowtide.config import build
from lowtide.errors import ConfigError
from lowtide.train.schedule import SCHEDULES, Schedule, updates_of
from lowtide.train.settings import TrainSettings

PEAK = 3e-3
NAMES = {"constant": "constant_with_warmup", "inverse_sqrt": "inverse_sqrt", "linear": "linear"}


def settings(**given: Any) -> TrainSettings:
    paths = {"model": "-", "data": "-", "adapter_path": "-"}
    return build(TrainSettings, {**paths, "learning_rate": PEAK, **given})


def scheduled(scheduler: Any, optimizer: torch.optim.Optimizer, updates: int) -> list[float]:
    """The rate of each update by torch's protocol."""
    rates = []
    for _ in range(updates):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def plain_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)


@pytest.mark.parametrize("updates", [1, 2, 50, 203])
@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
@pytest.mark.parametrize("kind", list(SCHEDULES))
def test_rates_are_those_of_transformers(kind: str, warmup: int, updates: int) -> None:
    from transformers import get_scheduler

    if warmup and warmup >= updates:
        with pytest.raises(ConfigError, match="so its learning rate would never be reached"):
            Schedule.of(settings(lr_schedule=kind, warmup_steps=warmup), updates)
        return
    for least in (0.0, 1e-4) if kind == "cosine" else (0.0,):
        optimizer = plain_optimizer()
        given = {"lr_schedule": kind, "warmup_steps": warmup, "min_lr": least}
        name = "cosine_with_min_lr" if least else NAMES.get(kind, "cosine")
        more = {"scheduler_specific_kwargs": {"min_lr": least}} if least else {}
        truth = get_scheduler(name, optimizer, warmup, updates, **more)
        ours = Schedule.of(settings(**given), updates)
        rates = [ours.rate(step) for step in range(1, updates + 1)]
        assert rates == pytest.approx(scheduled(truth, optimizer, updates), rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("least", [0.0, 2e-4])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_least_rate_is_that_of_torch(kind: str, least: float) -> None:
    optimizer, updates = plain_optimizer(), 60
    kinds: dict[str, Any] = {
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(
            optimizer, 1.0, least / PEAK, total_iters=updates
        ),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates, least),
    }
    truth = scheduled(kinds[kind](), optimizer, updates)
    ours = Schedule.of(settings(lr_schedule=kind, min_lr=least), updates)
    assert [ours.rate(step) for step in range(1, updates + 1)] == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("kind", list(SCHEDULES))
def test_a_rate_follows_from_the_step_alone(kind: str) -> None:
    ours = Schedule.of(settings(lr_schedule=kind, warmup_steps=3), 20)
    forward = [ours.rate(step) for step in range(1, 21)]
    assert [ours.rate(step) for step in reversed(range(1, 21))] == forward[::-1]
    assert forward[0] == 0.0
    assert max(forward) == forward[3] == PEAK


def test_a_ratio_is_a_share_of_the_updates_rounded_up() -> None:
    # transformers: math.ceil(num_training_steps * warmup_ratio)
    assert Schedule.of(settings(warmup_ratio=0.03), 100).warmup == 3
    assert Schedule.of(settings(warmup_ratio=0.03), 101).warmup == math.ceil(3.03)
    assert Schedule.of(settings(), 100).warmup == 0


@pytest.mark.parametrize(
    ("given", "batches", "updates"),
    [
        ({}, 7, 100),
        ({"iters": 12}, 7, 12),
        ({"epochs": 1}, 7, 7),
        ({"epochs": 3, "batch_size": 2}, 4, 12),
        ({"epochs": 0.5, "batch_size": 2, "grad_accumulation_steps": 3}, 30, 5),
        ({"epochs": 2, "grad_accumulation_steps": 3}, 7, 5),
        ({"epochs": 0.001}, 7, 1),
    ],
)
def test_how_many_updates_a_run_makes(given: dict[str, Any], batches: int, updates: int) -> None:
    assert updates_of(settings(**given), given.get("epochs", 0) * batches) == updates
