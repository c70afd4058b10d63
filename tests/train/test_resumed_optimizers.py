"""An optimiser that gets its state back goes on as if it had never ended."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowtide.train.optim import OPTIMIZERS, Optimizer
from lowtide.train.settings import OptimizerSettings
from lowtide.train.states import BLOCK, PIECE, STATES

SHAPES = {"a": (3, 5), "b": (PIECE // 7, 7), "c": (2, BLOCK + 1)}  # b has a second piece


def parameters(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}


def updates(optimizer: Optimizer, values: dict[str, Tensor], steps: range) -> None:
    """Gradients that follow from the step and the name."""
    for step in steps:
        optimizer.start(step, 0.05 / step)
        for number, (name, value) in enumerate(values.items()):
            generator = torch.Generator().manual_seed(100 * step + number)
            grad = torch.randn(value.shape, generator=generator)
            optimizer.update(name, value, grad.to(value.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("state", list(STATES))
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_steps_after_a_restart_are_the_same_to_the_bit(
    name: str, state: str, dtype: torch.dtype
) -> None:
    given: dict[str, Any] = {"weight_decay": 0.1, "momentum": 0.9 if name == "sgd" else 0.0}
    settings = OptimizerSettings(optimizer=name, optimizer_state=state, learning_rate=0.05, **given)
    whole, halves = parameters(dtype), parameters(dtype)
    unbroken = OPTIMIZERS[name](settings, whole)
    updates(unbroken, whole, range(1, 6))
    first = OPTIMIZERS[name](settings, halves)
    updates(first, halves, range(1, 4))
    kept = {key: tensor.clone() for key, tensor in first.state().items()}
    for tensor in first.state().values():
        tensor.fill_(1)  # these are the tensors themselves, and what follows must not look at them
    second = OPTIMIZERS[name](settings, halves)
    assert {key: (t.shape, t.dtype) for key, t in second.state().items()} == {
        key: (t.shape, t.dtype) for key, t in kept.items()
    }
    for key, tensor in second.state().items():
        tensor.copy_(kept[key])
    updates(second, halves, range(4, 6))
    assert all(torch.equal(whole[n], halves[n]) for n in SHAPES)
    assert all(torch.equal(second.state()[n], t) for n, t in unbroken.state().items())
