"""Where gradients go: applied at once and freed, or summed until the update is complete."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lowtide.errors import TrainingError

from .optim import Optimizer


def _require_finite(name: str, grad: Tensor) -> None:
    if not math.isfinite(float(grad.sum())) and not bool(torch.isfinite(grad).all()):
        raise TrainingError(
            f"the gradient of {name} is not finite, though the loss was. Lower --learning-rate, or "
            "clip with --max-grad-norm."
        )


class ApplySink:
    """Applies the optimiser to each gradient as it comes: no gradient outlives its use."""

    def __init__(self, parameters: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        """Update `parameters` in place."""
        self._parameters = parameters
        self._optimizer = optimizer

    def add(self, name: str, grad: Tensor) -> None:
        """See `GradSink.add`."""
        _require_finite(name, grad)
        self._optimizer.update(name, self._parameters[name], grad)

    def finish(self) -> float | None:
        """End the update. The global norm is not known in this mode."""
        self._optimizer.next_step()
        return None


class AccumulateSink:
    """Sums gradients over micro-batches, clips their global norm, then applies the optimiser."""

    def __init__(
        self, parameters: Mapping[str, Tensor], optimizer: Optimizer, max_norm: float | None
    ) -> None:
        """Update `parameters` in place when `finish` is called."""
        self._parameters = parameters
        self._optimizer = optimizer
        self._max_norm = max_norm
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, grad: Tensor) -> None:
        """See `GradSink.add`."""
        _require_finite(name, grad)
        if name in self._sums:
            self._sums[name].add_(grad)
        else:
            self._sums[name] = grad

    def finish(self) -> float | None:
        """Clip, apply, free; returns the global norm before clipping.

        Returns:
            The norm over all parameters, before clipping.

        Raises:
            TrainingError: the norm is not finite.
        """
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in self._sums.values()))
        if not math.isfinite(norm):
            raise TrainingError("the global gradient norm is not finite. Lower --learning-rate.")
        clip = 1.0
        if self._max_norm is not None and norm > self._max_norm:
            clip = self._max_norm / norm
        for name in list(self._sums):
            grad = self._sums.pop(name)
            self._optimizer.update(name, self._parameters[name], grad.mul_(clip))
        self._optimizer.next_step()
        return norm
