"""Where gradients go: applied at once and freed, or summed until the update is complete.

An update is one pass over its micro-batches, or two; `updater` chooses. A gradient's norm is also
how it is seen to be finite, so that norms are known in every mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowtide.errors import TrainingError
from lowtide.methods import GradSink
from lowtide.model.adapter import layer_of

from .optim import Optimizer
from .recipe import RecipeSettings

Pass = Callable[[GradSink], float]
"""Runs all micro-batches of an update, sends their gradients to a sink, returns the loss."""


@dataclass(frozen=True)
class Norms:
    """Norms of an update's gradients, before clipping.

    Attributes:
        total: over all parameters.
        by_layer: over those of each block up to the last that is trained; None of one without a
            gradient.
    """

    total: float
    by_layer: list[float | None]


class _Squares:
    """Squared norms by block, summed as gradients come."""

    def __init__(self) -> None:
        self._of: dict[int, float] = {}

    def add(self, name: str, norm: float) -> None:
        layer = layer_of(name)
        self._of[layer] = self._of.get(layer, 0.0) + norm * norm

    def norms(self) -> Norms:
        last = max(self._of, default=-1)
        layers = (self._of.get(layer) for layer in range(last + 1))
        by_layer = [None if square is None else math.sqrt(square) for square in layers]
        return Norms(math.sqrt(sum(self._of.values())), by_layer)


def _finite_norm(name: str, grad: Tensor) -> float:
    """The norm of a gradient; TrainingError where an element is not finite."""
    norm = float(torch.linalg.vector_norm(grad))
    if not math.isfinite(norm):  # of float32 squares it may overflow though all is finite
        norm = float(torch.linalg.vector_norm(grad.double()))
    if not math.isfinite(norm):
        raise TrainingError(
            f"the gradient of {name} is not finite, though the loss was. Lower --learning-rate, or "
            "clip with --max-grad-norm."
        )
    return norm


def _factor(norm: float, most: float | None) -> float:
    """What a gradient of that norm is to be multiplied by."""
    return 1.0 if most is None or norm <= most else most / norm


class _MeasureSink:
    """Takes the norms, and drops the gradients."""

    def __init__(self) -> None:
        self.squares = _Squares()

    def add(self, name: str, grad: Tensor) -> None:
        self.squares.add(name, _finite_norm(name, grad))


class _ApplySink:
    """Applies the optimiser to each gradient as it comes: no gradient outlives its use."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        optimizer: Optimizer,
        factor: Callable[[float], float],
    ) -> None:
        """Update `parameters` in place by gradients times the `factor` of their norm."""
        self._parameters, self._optimizer, self._factor = parameters, optimizer, factor
        self.squares = _Squares()

    def add(self, name: str, grad: Tensor) -> None:
        norm = _finite_norm(name, grad)
        self.squares.add(name, norm)
        factor = self._factor(norm)
        if factor != 1.0:
            grad.mul_(factor)
        self._optimizer.update(name, self._parameters[name], grad)


class _SumSink:
    """Sums gradients over micro-batches."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, grad: Tensor) -> None:
        if name in self.sums:
            self.sums[name].add_(grad)
        else:
            self.sums[name] = grad


class Updater(Protocol):
    """One way to make an update of the gradients that passes give."""

    def update(self, run: Pass) -> tuple[float, Norms]:
        """Change the parameters.

        Args:
            run: gives the same gradients each time, if the parameters have not changed.

        Returns:
            What `run` returned, and the norms of the gradients before clipping.

        Raises:
            TrainingError: a gradient is not finite.
        """


class InBackward:
    """Each gradient is applied as it comes, clipped by its own norm where there is a limit."""

    def __init__(
        self, parameters: Mapping[str, Tensor], optimizer: Optimizer, max_norm: float | None = None
    ) -> None:
        """Update `parameters` in place; `max_norm` is of each of them."""
        self._parameters, self._optimizer, self._max_norm = parameters, optimizer, max_norm

    def update(self, run: Pass) -> tuple[float, Norms]:
        """See `Updater.update`."""
        sink = _ApplySink(
            self._parameters, self._optimizer, lambda norm: _factor(norm, self._max_norm)
        )
        return run(sink), sink.squares.norms()


class TwoPass:
    """A first pass finds the global norm, a second applies gradients clipped by it."""

    def __init__(
        self, parameters: Mapping[str, Tensor], optimizer: Optimizer, max_norm: float
    ) -> None:
        """Update `parameters` in place; `max_norm` is of all together."""
        self._parameters, self._optimizer, self._max_norm = parameters, optimizer, max_norm

    def update(self, run: Pass) -> tuple[float, Norms]:
        """See `Updater.update`."""
        first = _MeasureSink()
        loss = run(first)
        norms = first.squares.norms()
        factor = _factor(norms.total, self._max_norm)
        run(_ApplySink(self._parameters, self._optimizer, lambda _: factor))
        return loss, norms


class Accumulated:
    """All gradients are summed over the micro-batches, clipped, then applied and freed."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        optimizer: Optimizer,
        max_norm: float | None = None,
        *,
        each: bool = False,
    ) -> None:
        """Update `parameters` in place; `max_norm` is of all together, or of `each`."""
        self._parameters, self._optimizer = parameters, optimizer
        self._max_norm, self._each = max_norm, each

    def update(self, run: Pass) -> tuple[float, Norms]:
        """See `Updater.update`."""
        sink, squares = _SumSink(), _Squares()
        loss = run(sink)
        own = {name: _finite_norm(name, grad) for name, grad in sink.sums.items()}
        for name, norm in own.items():
            squares.add(name, norm)
        norms = squares.norms()
        for name in list(sink.sums):
            grad = sink.sums.pop(name)
            factor = _factor(own[name] if self._each else norms.total, self._max_norm)
            self._optimizer.update(
                name, self._parameters[name], grad if factor == 1.0 else grad.mul_(factor)
            )
        return loss, norms


def updater(
    settings: RecipeSettings, parameters: Mapping[str, Tensor], optimizer: Optimizer
) -> Updater:
    """The way that the settings ask for.

    Args:
        settings: accumulation and clipping.
        parameters: of the adapter, by PEFT name.
        optimizer: with their state.

    Returns:
        What makes updates.
    """
    most, mode = settings.max_grad_norm, settings.clip_mode
    if settings.accumulates:
        return Accumulated(parameters, optimizer, most, each=mode == "per-parameter")
    if most is not None and mode == "two-pass":
        return TwoPass(parameters, optimizer, most)
    return InBackward(parameters, optimizer, most)
