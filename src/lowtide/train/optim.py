"""Optimisers that update one parameter at a time, so that its gradient can be freed at once.

The rules are torch.optim's (`SGD`, `AdamW`) and that of Lion's paper, to which tests hold them.
State of all parameters is one tensor per moment, reserved at the start and backed by memory as it
is first written: many small tensors, made between gradients that come and go, would leave holes in
the heap. `states.py` keeps it in fewer bits where that is asked for. `adafactor.py` has the one
whose rule is not elementwise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from .adafactor import Adafactor
from .groups import Groups, Rates
from .states import BLOCK, STATES, Master, packing_bytes, spans, state_bytes

if TYPE_CHECKING:
    from .recipe import OptimizerSettings


class Optimizer(Protocol):
    """Updates parameters in place, one at a time.

    An update depends on the parameters, the gradients, the settings, what `start` says and
    `state()` only, so that a run that gets these back goes on as if it had never ended.
    """

    def __init__(self, settings: OptimizerSettings, parameters: Mapping[str, Tensor]) -> None:
        """Reserve the state of the parameters."""

    def state(self) -> dict[str, Tensor]:
        """All that is kept from one update to the next: the tensors themselves, not copies."""

    def start(self, step: int, learning_rate: float) -> None:
        """The update of that number, from 1, begins; every parameter comes once or not at all."""

    def update(self, name: str, parameter: Tensor, grad: Tensor) -> None:
        """Change `parameter` by its gradient; `grad` may be overwritten."""

    @staticmethod
    def held_bytes(held: Held) -> int:
        """Bytes of the state of such parameters, and of what packing it takes."""


class Held(NamedTuple):
    """What the planner knows of an optimiser's state.

    Attributes:
        shapes: of each parameter.
        itemsize: bytes of an element of the computation.
        state: a name of STATES.
        momentum: whether sgd keeps a buffer.
    """

    shapes: Sequence[Sequence[int]]
    itemsize: int
    state: str
    momentum: bool


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
        self._groups = Groups(settings, parameters)
        self._moments = [STATES[settings.optimizer_state](parameters, sign) for sign in signed]
        rounded = next(iter(parameters.values())).dtype == torch.bfloat16
        self._master = Master(parameters) if rounded else None
        self._whole = not rounded and settings.optimizer_state == "float32"
        self._places = {name: place for place, name in enumerate(parameters)}
        self._random = torch.Generator()
        self._step, self._rate = 1, settings.learning_rate

    def start(self, step: int, learning_rate: float) -> None:
        """See `Optimizer.start`."""
        self._step, self._rate = step, learning_rate

    def update(self, name: str, parameter: Tensor, grad: Tensor) -> None:
        """See `Optimizer.update`."""
        values, slopes = parameter.view(-1), grad.reshape(-1)
        rates = self._groups.rates(name, self._rate)
        for span in spans(len(values), whole=self._whole):
            held = values[span]
            value = held if self._master is None else self._master.read(name, held, span)
            moments = [moment.read(name, span) for moment in self._moments]
            self._change(value, slopes[span].to(value.dtype), moments, rates)
            for number, moment in enumerate(self._moments):
                self._seed(name, number, span)
                moment.write(name, span, self._random)
            if self._master is not None:
                self._master.write(name, held, span)

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
            seed = ((2 * self._step + number) * 1_000_003 + place) * 0x9E3779B1
            self._random.manual_seed(seed & (1 << 63) - 1)

    @abstractmethod
    def _change(self, value: Tensor, grad: Tensor, moments: Sequence[Tensor], rates: Rates) -> None:
        """Change elements and their moments in place; `grad` may be overwritten."""


def _moments_bytes(held: Held, moments: int) -> int:
    sizes = [math.prod(shape) for shape in held.shapes]
    packing = packing_bytes(held.state) if moments else 0
    return moments * state_bytes(held.state, sizes, held.itemsize) + packing


class Sgd(_Elementwise):
    """`buf = momentum * buf + g + wd * p`, `p -= lr * buf`."""

    def __init__(self, settings: OptimizerSettings, parameters: Mapping[str, Tensor]) -> None:
        """Take lr, momentum and weight decay from the settings; state only with momentum."""
        super().__init__(settings, parameters, [True] if settings.momentum else [])

    def _change(self, value: Tensor, grad: Tensor, moments: Sequence[Tensor], rates: Rates) -> None:
        if rates.weight_decay:
            grad = grad.add_(value, alpha=rates.weight_decay)
        if moments:
            grad = moments[0].mul_(self._settings.momentum).add_(grad)
        value.add_(grad, alpha=-rates.learning_rate)

    @staticmethod
    def held_bytes(held: Held) -> int:
        """See `Optimizer.held_bytes`."""
        return _moments_bytes(held, 1 if held.momentum else 0)


class AdamW(_Elementwise):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    beta2: ClassVar[float] = 0.999

    def __init__(self, settings: OptimizerSettings, parameters: Mapping[str, Tensor]) -> None:
        """Take lr, betas, eps and weight decay from the settings."""
        super().__init__(settings, parameters, [True, False])
        self._betas = _betas(settings, self.beta2)

    def _change(self, value: Tensor, grad: Tensor, moments: Sequence[Tensor], rates: Rates) -> None:
        beta1, beta2 = self._betas
        mean, square = moments
        grad = grad.to(mean.dtype)
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction = 1 - beta1**self._step
        scale = math.sqrt(1 - beta2**self._step)
        denominator = torch.sqrt(square, out=grad).div_(scale).add_(self._settings.adam_eps)
        value.mul_(1 - rates.learning_rate * rates.weight_decay)
        value.addcdiv_(mean, denominator, value=-rates.learning_rate / correction)

    @staticmethod
    def held_bytes(held: Held) -> int:
        """See `Optimizer.held_bytes`."""
        return _moments_bytes(held, 2)


class Lion(_Elementwise):
    """The sign of a blend of momentum and gradient (arXiv 2302.06675, algorithm 2).

    `c = beta1 m + (1 - beta1) g`, `p -= lr (sign(c) + wd p)`, `m = beta2 m + (1 - beta2) g`.
    """

    beta2: ClassVar[float] = 0.99

    def __init__(self, settings: OptimizerSettings, parameters: Mapping[str, Tensor]) -> None:
        """Take lr, betas and weight decay from the settings."""
        super().__init__(settings, parameters, [True])
        self._betas = _betas(settings, self.beta2)

    def _change(self, value: Tensor, grad: Tensor, moments: Sequence[Tensor], rates: Rates) -> None:
        beta1, beta2 = self._betas
        (mean,) = moments
        grad = grad.to(mean.dtype)
        blend = mean.lerp(grad, 1 - beta1).sign_()
        mean.lerp_(grad, 1 - beta2)
        value.mul_(1 - rates.learning_rate * rates.weight_decay)
        value.add_(blend, alpha=-rates.learning_rate)

    @staticmethod
    def held_bytes(held: Held) -> int:
        """See `Optimizer.held_bytes`."""
        return _moments_bytes(held, 1)


def _betas(settings: OptimizerSettings, usual: float) -> tuple[float, float]:
    return settings.beta1, usual if settings.beta2 is None else settings.beta2


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": Sgd,
    "adamw": AdamW,
    "lion": Lion,
    "adafactor": Adafactor,
}
