"""Optimisers that update one parameter at a time, so that its gradient can be freed at once.

The rules are torch.optim's (`SGD`, `AdamW`), to which tests hold them. State is created when a
parameter's first gradient comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


class Sgd:
    """`buf = momentum * buf + g + wd * p`, `p -= lr * buf`."""

    def __init__(self, settings: OptimizerSettings) -> None:
        """Take lr, momentum and weight decay from the settings."""
        self._settings = settings
        self._buffers: dict[str, Tensor] = {}

    def update(self, name: str, parameter: Tensor, grad: Tensor) -> None:
        """See `Optimizer.update`."""
        s = self._settings
        if s.weight_decay:
            grad = grad.add_(parameter, alpha=s.weight_decay)
        if s.momentum:
            buffer = self._buffers.get(name)
            if buffer is None:
                self._buffers[name] = grad
            else:
                grad = buffer.mul_(s.momentum).add_(grad)
        parameter.add_(grad, alpha=-s.learning_rate)

    def next_step(self) -> None:
        """Nothing depends on the step."""


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101), state in the parameter's dtype."""

    def __init__(self, settings: OptimizerSettings) -> None:
        """Take lr, betas, eps and weight decay from the settings."""
        self._settings = settings
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._step = 1

    def update(self, name: str, parameter: Tensor, grad: Tensor) -> None:
        """See `Optimizer.update`."""
        s = self._settings
        if name not in self._moments:
            self._moments[name] = (torch.zeros_like(parameter), torch.zeros_like(parameter))
        mean, square = self._moments[name]
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


OPTIMIZERS: dict[str, Callable[[OptimizerSettings], Optimizer]] = {"sgd": Sgd, "adamw": AdamW}
