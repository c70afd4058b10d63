"""Adafactor: a second moment kept as its row and column means (arXiv 1804.04235).

For a matrix of n rows and m columns, with `t` the update:

    row_i += t^-0.8 (mean_j g_ij^2 + e0 - row_i)      col_j += t^-0.8 (mean_i g_ij^2 + e0 - col_j)
    v_ij = row_i col_j / max(mean row, e1)            u = g / sqrt(max(v, e2))
    p -= alpha u / max(1, rms(u))                     after p *= 1 - lr wd

Two rules are in use under this name. transformers' `adafactor` takes `alpha = lr` and e0 = 1e-30,
and no other limit. Relative, torch.optim's takes `alpha = max(1e-3, rms(p)) min(lr, 1 / sqrt(t))`,
and of the dtype's epsilon e1 = eps, e2 = eps^2: gradients of LoRA are often so small that these
decide (docs/log.md). Of a vector v is kept whole.

A matrix of A or B keeps (n + m) numbers instead of n m, and its update needs nothing beside the
gradient, which becomes u, but a few rows of v.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .groups import Groups
from .states import PIECE, Master, wide_dtype, zeros_for

if TYPE_CHECKING:
    from .optim import Held
    from .recipe import OptimizerSettings

_DECAY = -0.8
_LEAST_SCALE = 1e-3


class _Limits(NamedTuple):
    """e0, e1 and e2 of the formulas."""

    added: float
    mean: float
    square: float


class Adafactor:
    """See the module's text."""

    def __init__(self, settings: OptimizerSettings, parameters: Mapping[str, Tensor]) -> None:
        """Reserve one number per row and per column of each matrix, and one per vector element."""
        self._relative = settings.adafactor_relative
        self._groups = Groups(settings, parameters)
        self._dtype = wide_dtype(parameters)
        numbers = torch.finfo(self._dtype)
        self._limits = _Limits(1e-30, numbers.tiny, numbers.tiny)  # tiny, so that 0 is no divisor
        if self._relative:
            self._limits = _Limits(0.0, numbers.eps, numbers.eps**2)
        # As if they were parameters: of a matrix a row of numbers, then a column.
        shape_only = {n: torch.empty(_kept(p.shape), device="meta") for n, p in parameters.items()}
        self._squares = zeros_for(shape_only, self._dtype)
        rounded = next(iter(parameters.values())).dtype == torch.bfloat16
        self._master = Master(parameters) if rounded else None
        self._step, self._rate = 1, settings.learning_rate

    def start(self, step: int, learning_rate: float) -> None:
        """See `Optimizer.start`."""
        self._step, self._rate = step, learning_rate

    def update(self, name: str, parameter: Tensor, grad: Tensor) -> None:
        """See `Optimizer.update`."""
        rates = self._groups.rates(name, self._rate)
        update = grad.to(self._dtype).contiguous()
        self._normalise_(self._squares[name], update)
        alpha = rates.learning_rate
        if self._relative:
            size = math.sqrt(sum(float(v.square().sum()) for v, _ in self._pieces(name, parameter)))
            size /= math.sqrt(parameter.numel())
            alpha = max(_LEAST_SCALE, size) * min(alpha, 1 / math.sqrt(self._step))
        alpha /= max(1.0, _rms(update))
        flat = update.view(-1)
        for value, span in self._pieces(name, parameter):
            if rates.weight_decay:
                value.mul_(1 - rates.learning_rate * rates.weight_decay)
            value.add_(flat[span], alpha=-alpha)
            if self._master is not None:
                self._master.write(name, parameter.view(-1)[span], span)

    def _normalise_(self, squares: Tensor, update: Tensor) -> None:
        """Take the gradient into the second moment, and divide it by that one's root in place."""
        weight, limits = self._step**_DECAY, self._limits
        if update.ndim == 1:
            squares.lerp_(update.square().add_(limits.added), weight)
            update.mul_(squares.clamp(min=limits.square).rsqrt_())
            return
        rows, columns = update.shape
        row, column = squares[:rows].unsqueeze(1), squares[rows:].unsqueeze(0)
        row.lerp_(_mean_square(update, 1).add_(limits.added), weight)
        column.lerp_(_mean_square(update, 0).add_(limits.added), weight)
        mean = max(float(row.mean()), limits.mean)
        step = max(1, PIECE // columns)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            square = (row[part] / mean) * column
            update[part].mul_(square.clamp_(min=limits.square).rsqrt_())

    def _pieces(self, name: str, parameter: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """The parameter, flat, in the dtype of the computation: all of it, or piece by piece."""
        values = parameter.view(-1)
        if self._master is None:
            yield values, slice(0, len(values))
            return
        for start in range(0, len(values), PIECE):
            span = slice(start, min(start + PIECE, len(values)))
            yield self._master.read(name, values[span], span), span

    def state(self) -> dict[str, Tensor]:
        """See `Optimizer.state`."""
        kept = {"squares": self._squares}
        if self._master is not None:
            kept["master"] = self._master.tensors()
        return {f"{part}.{name}": t for part, own in kept.items() for name, t in own.items()}

    @staticmethod
    def held_bytes(held: Held) -> int:
        """See `Optimizer.held_bytes`; what is divided at a time counts as packing."""
        widest = max(shape[-1] for shape in held.shapes)
        return (sum(map(_kept, held.shapes)) + max(PIECE, widest)) * held.itemsize


def _mean_square(x: Tensor, dim: int) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return norm.square_().div_(x.shape[dim])


def _kept(shape: Sequence[int]) -> int:
    return sum(shape)


def _rms(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x)) / math.sqrt(x.numel())
