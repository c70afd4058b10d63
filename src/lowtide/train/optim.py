"""Optimisers that update one parameter at a time, so that its gradient can be freed at once.

The rules are torch.optim's (`SGD`, `AdamW`), to which tests hold them. State of all parameters is
one tensor per moment, reserved at the start and backed by memory as it is first written: many
small tensors, made between gradients that come and go, would leave holes in the heap. `states.py`
keeps it in fewer bits where that is asked for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .states import BLOCK, STATES, Master, spans

if TYPE_CHECKING:
    from .settings import OptimizerSettings


class Optimizer(Protocol):
    """Updates parameters in place, one at a time.

    An update depends on the parameters, the gradients, the settings, `step` and `state()` only, so
    that a run that gets these back goes on as if it had never ended.
    """

    step: int
    """The update that comes next or is being made, from 1."""

    def state(self) -> dict[str, Tensor]:
        """All that is kept from one update to the next: the tensors themselves, not copies."""

    def update(self, name: str, parameter: Tensor, grad: Tensor) -> None:
        """Change `parameter` by its gradient; `grad` may be overwritten."""

    def next_step(self) -> None:
        """All parameters of this step have been updated."""


class _Elementwise(ABC):
    """A rule that treats each element by itself, so that a parameter can be updated in pieces."""

    def __init__(
        self, settings: OptimizerSettings, parameters: Mapping[str, Tensor], signed: Sequence[bool]
    ) -> None:
        """Reserve the state.

        Args:
            settings: rates, and how the state is kept.
            parameters: by name; of bfloat16 ones the float32 values are kept here.
            signed: whether each moment has elements of either sign.
        """
        self._settings = settings
        self._moments = [STATES[settings.optimizer_state](parameters, sign) for sign in signed]
        rounded = next(iter(parameters.values())).dtype == torch.bfloat16
        self._master = Master(parameters) if rounded else None
        self._whole = not rounded and settings.optimizer_state == "float32"
        self._places = {name: place for place, name in enumerate(parameters)}
        self._random = torch.Generator()
        self.step = 1

    def update(self, name: str, parameter: Tensor, grad: Tensor) -> None:
        """See `Optimizer.update`."""
        values, slopes = parameter.view(-1), grad.reshape(-1)
        for span in spans(len(values), whole=self._whole):
            held = values[span]
            value = held if self._master is None else self._master.read(name, held, span)
            moments = [moment.read(name, span) for moment in self._moments]
            self._change(value, slopes[span].to(value.dtype), moments)
            for number, moment in enumerate(self._moments):
                self._seed(name, number, span)
                moment.write(name, span, self._random)
            if self._master is not None:
                self._master.write(name, held, span)

    def next_step(self) -> None:
        """See `Optimizer.next_step`."""
        self.step += 1

    def state(self) -> dict[str, Tensor]:
        """See `Optimizer.state`."""
        kept = {f"moments.{n}": moment.tensors() for n, moment in enumerate(self._moments)}
        if self._master is not None:
            kept["master"] = self._master.tensors()
        return {f"{part}.{name}": t for part, own in kept.items() for name, t in own.items()}

    def _seed(self, name: str, number: int, span: slice) -> None:
        """What rounding draws depends on the step and the place, not on what was drawn before."""
        if not self._whole:
            place = (self._places[name] << 8) + span.start // BLOCK
            seed = ((2 * self.step + number) * 1_000_003 + place) * 0x9E3779B1
            self._random.manual_seed(seed & (1 << 63) - 1)

    @abstractmethod
    def _change(self, value: Tensor, grad: Tensor, moments: Sequence[Tensor]) -> None:
        """Change elements and their moments in place; `grad` may be overwritten."""


class Sgd(_Elementwise):
    """`buf = momentum * buf + g + wd * p`, `p -= lr * buf`."""

    def __init__(self, settings: OptimizerSettings, parameters: Mapping[str, Tensor]) -> None:
        """Take lr, momentum and weight decay from the settings; state only with momentum."""
        super().__init__(settings, parameters, [True] if settings.momentum else [])

    def _change(self, value: Tensor, grad: Tensor, moments: Sequence[Tensor]) -> None:
        s = self._settings
        if s.weight_decay:
            grad = grad.add_(value, alpha=s.weight_decay)
        if s.momentum:
            grad = moments[0].mul_(s.momentum).add_(grad)
        value.add_(grad, alpha=-s.learning_rate)


class AdamW(_Elementwise):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    def __init__(self, settings: OptimizerSettings, parameters: Mapping[str, Tensor]) -> None:
        """Take lr, betas, eps and weight decay from the settings."""
        super().__init__(settings, parameters, [True, False])

    def _change(self, value: Tensor, grad: Tensor, moments: Sequence[Tensor]) -> None:
        s = self._settings
        mean, square = moments
        grad = grad.to(mean.dtype)
        mean.lerp_(grad, 1 - s.beta1)
        square.mul_(s.beta2).addcmul_(grad, grad, value=1 - s.beta2)
        correction = 1 - s.beta1**self.step
        scale = math.sqrt(1 - s.beta2**self.step)
        denominator = torch.sqrt(square, out=grad).div_(scale).add_(s.adam_eps)
        value.mul_(1 - s.learning_rate * s.weight_decay)
        value.addcdiv_(mean, denominator, value=-s.learning_rate / correction)


OPTIMIZERS: dict[str, Callable[[OptimizerSettings, Mapping[str, Tensor]], Optimizer]] = {
    "sgd": Sgd,
    "adamw": AdamW,
}
