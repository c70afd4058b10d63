"""The interface of a training method, and of what takes its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lowtide.model.adapter import Adapter
from lowtide.model.batch import Batch
from lowtide.model.decoder import Decoder


class GradSink(Protocol):
    """Takes each parameter's gradient as soon as it exists; whoever adds it forgets it."""

    def add(self, name: str, grad: Tensor) -> None:
        """Use or accumulate the gradient of the PEFT-named parameter.

        After this call the method no longer reads that parameter in this step, so it may be
        updated at once.
        """


@dataclass(frozen=True)
class Step:
    """What one call of a method is about.

    Attributes:
        scale: the gradient is of `scale * sum of losses`; 1 / labelled tokens of the update.
        dropout_seed: of this micro-batch's LoRA dropout; None for none.
    """

    scale: float
    dropout_seed: int | None = None


class Method(Protocol):
    """One way to get from a batch to the adapter's gradients. May keep buffers between calls."""

    name: str
    exact: bool

    def step(
        self, model: Decoder, adapter: Adapter, batch: Batch, sink: GradSink, step: Step
    ) -> float:
        """Send every parameter's gradient to `sink`.

        Returns:
            The sum of the losses of the labelled positions, in nats.
        """

    def loss(self, model: Decoder, adapter: Adapter | None, batch: Batch) -> float:
        """The sum of the losses without gradients and without dropout."""
