"""Optimisers that update one parameter at a time, so that its gradient can be freed at once.

The rules are torch.optim's (`SGD`, `AdamW`), to which tests hold them. State of all parameters is
one tensor per moment, reserved at the start and backed by memory as it is first written: many
small tensors, made between gradients that come and go, would leave holes in the heap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .settings import OptimizerSettings


class Optimizer(Protocol):
    """Updates parameters in place, one at a time."""

    def update(self, name: str, parameter: Tensor, grad: Tensor) -> None:
        """Change `parameter` by its gradient; `grad` may be overwritten."""

    def next_step(self) -> None:
        """All parameters of this step have been updated."""


def zeros_for(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros shaped like each parameter, all views of one tensor."""
    some = next(iter(parameters.values()))
    flat = torch.zeros(sum(p.numel() for p in parameters.values()), dtype=some.dtype)
    parts = torch.split(flat, [p.numel() for p in parameters.values()])
    return {
        name: part.view(p.shape) for (name, p), part in zip(parameters.items(), parts, strict=True)
    }


class Sgd:
    """`buf = momentum * buf + g + wd * p`, `p -= lr * buf`."""

    def __init__(self, settings: OptimizerSettings, parameters: Mapping[str, Tensor]) -> None:
        """Take lr, momentum and weight decay from the settings; state only with momentum."""
        self._settings = settings
        self._buffers = zeros_for(parameters) if settings.momentum else {}

    def update(self, name: str, parameter: Tensor, grad: Tensor) -> None:
        """See `Optimizer.update`."""
        s = self._settings
        if s.weight_decay:
            grad = grad.add_(parameter, alpha=s.weight_decay)
        if s.momentum:
            grad = self._buffers[name].mul_(s.momentum).add_(grad)
        parameter.add_(grad, alpha=-s.learning_rate)

    def next_step(self) -> None:
        """Nothing depends on the step."""


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101), state in the parameter's dtype."""

    def __init__(self, settings: OptimizerSettings, parameters: Mapping[str, Tensor]) -> None:
        """Take lr, betas, eps and weight decay from the settings."""
        self._settings = settings
        self._means, self._squares = zeros_for(parameters), zeros_for(parameters)
        self._step = 1

    def update(self, name: str, parameter: Tensor, grad: Tensor) -> None:
        """See `Optimizer.update`."""
        s = self._settings
        mean, square = self._means[name], self._squares[name]
        mean.lerp_(grad, 1 - s.beta1)
        square.mul_(s.beta2).addcmul_(grad, grad, value=1 - s.beta2)
        correction = 1 - s.beta1**self._step
        scale = math.sqrt(1 - s.beta2**self._step)
        denominator = torch.sqrt(square, out=grad).div_(scale).add_(s.adam_eps)
        parameter.mul_(1 - s.learning_rate * s.weight_decay)
        parameter.addcdiv_(mean, denominator, value=-s.learning_rate / correction)

    def next_step(self) -> None:
        """Advance the bias corrections."""
        self._step += 1


OPTIMIZERS: dict[str, Callable[[OptimizerSettings, Mapping[str, Tensor]], Optimizer]] = {
    "sgd": Sgd,
    "adamw": AdamW,
}
