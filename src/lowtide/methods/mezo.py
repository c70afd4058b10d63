"""MeZO: zeroth-order estimates from forward passes alone (arXiv 2305.17333). Not exact.

    g_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps)      estimate = mean_k g_k z_k

z is normal and never stored: each use draws it again from its seed. Nor is theta changed and put
back: each block is given perturbed copies of its own small matrices, made as the forward reaches
it, so that the parameters are untouched to the bit whatever happens in between. Memory is that of
a forward pass and of one block's adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowtide.errors import TrainingError
from lowtide.model.adapter import MAGNITUDE, Adapter, parameter_name
from lowtide.model.batch import Batch
from lowtide.model.decoder import Decoder
from lowtide.ops.lora_linear import Lora

from .base import GradSink, Step, require_finite
from .buffers import Buffers
from .options import MethodOptions
from .structured import structured_losses


class Direction:
    """A random direction z over all parameters of an adapter, drawn again whenever it is needed."""

    def __init__(self, adapter: Adapter, seed: int, number: int) -> None:
        """The direction of that number in the step of that seed."""
        self._adapter = adapter
        self._seed = (seed * 1_000_003 + number) * 0x9E3779B1
        self._places = {name: place for place, (name, _) in enumerate(adapter.items())}

    def of(self, name: str) -> Tensor:
        """z of the parameter of that PEFT name, in its shape and the compute dtype."""
        shape, dtype = self._adapter.parameters[name].shape, self._adapter.compute_dtype
        seed = (self._seed + self._places[name] * 0x85EBCA77) & (1 << 63) - 1
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=dtype)


class _Moved(Adapter):
    """`theta + distance z`, formed one linear at a time."""

    def __init__(self, adapter: Adapter, direction: Direction, distance: float) -> None:
        super().__init__(adapter.config, adapter.parameters, adapter.compute_dtype)
        self._direction, self._distance = direction, distance

    def lora(self, layer: int, linear: str, dropout_seed: int | None) -> Lora | None:
        lora = super().lora(layer, linear, dropout_seed)
        if lora is None:
            return None
        return lora._replace(
            a=self._move(lora.a, parameter_name(layer, linear, "A")),
            b=self._move(lora.b, parameter_name(layer, linear, "B")),
        )

    def magnitude(self, layer: int, linear: str) -> Tensor | None:
        m = super().magnitude(layer, linear)
        return None if m is None else self._move(m, parameter_name(layer, linear, MAGNITUDE))

    def _move(self, parameter: Tensor, name: str) -> Tensor:
        return self._direction.of(name).mul_(self._distance).add_(parameter)


class Mezo:
    """Keeps the forward's buffers between steps."""

    name = "mezo"
    exact = False

    def __init__(self, options: MethodOptions | None = None) -> None:
        """Take `zo_eps` and `zo_directions` from the options."""
        options = options or MethodOptions()
        self._eps, self._directions = options.zo_eps, options.zo_directions
        self._buffers = Buffers(tiles=options.tiles)

    def reserve(self, model: Decoder, max_tokens: int, max_length: int) -> None:
        """See `Method.reserve`."""
        self._buffers.reserve(model, max_tokens, max_length, 2)

    def release(self) -> None:
        """See `Method.release`."""
        self._buffers.release()

    def step(
        self, model: Decoder, adapter: Adapter, batch: Batch, sink: GradSink, step: Step
    ) -> float:
        """See `Method.step`; sends estimates, and returns the mean of the losses it saw.

        Dropout's mask is the same in all forwards of a step.
        """
        directions = [Direction(adapter, step.seed, k) for k in range(self._directions)]
        slopes, totals = [], []
        for direction in directions:
            plus, minus = (
                self._total(model, _Moved(adapter, direction, distance), batch, step)
                for distance in (self._eps, -self._eps)
            )
            slopes.append(step.scale * (plus - minus) / (2 * self._eps) / len(directions))
            totals += [plus, minus]
        for name in adapter.parameters:
            estimate = directions[0].of(name).mul_(slopes[0])
            for direction, slope in zip(directions[1:], slopes[1:], strict=True):
                estimate.add_(direction.of(name), alpha=slope)
            sink.add(name, estimate)
        return sum(totals) / len(totals)

    def loss(self, model: Decoder, adapter: Adapter | None, batch: Batch) -> float:
        """See `Method.loss`."""
        return float(structured_losses(model, adapter, batch, self._buffers).sum())

    def _total(self, model: Decoder, adapter: Adapter, batch: Batch, step: Step) -> float:
        losses = structured_losses(
            model, adapter, batch, self._buffers, step.dropout_seed, step.noise
        )
        # Two nearly equal sums are subtracted, so they are formed in float64.
        try:
            return require_finite(losses.double())
        except TrainingError as error:
            raise TrainingError(
                f"at a perturbed point, {error} A smaller --zo-eps may help."
            ) from error
