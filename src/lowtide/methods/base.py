"""The interface of a training method, and of what takes its gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lowtide.errors import TrainingError
from lowtide.model.adapter import Adapter
from lowtide.model.batch import Batch
from lowtide.model.decoder import Decoder
from lowtide.model.neftune import Noise


class GradSink(Protocol):
    """Takes each parameter's gradient as soon as it exists; whoever adds it forgets it."""

    def add(self, name: str, grad: Tensor) -> None:
        """Use or accumulate the gradient of the PEFT-named parameter; it now belongs to the sink.

        After this call the method no longer reads that parameter in this step, so it may be
        updated at once.
        """


@dataclass(frozen=True)
class Step:
    """What one call of a method is about.

    Attributes:
        scale: the gradient is of `scale * sum of losses`; 1 / labelled tokens of the update.
        dropout_seed: of this micro-batch's LoRA dropout; None for none.
        number: of the update, from 0.
        seed: of what a method draws at random in this micro-batch.
        noise: on the embeddings of this micro-batch; None for none.
    """

    scale: float
    dropout_seed: int | None = None
    number: int = 0
    seed: int = 0
    noise: Noise | None = None


class Method(Protocol):
    """One way to get from a batch to the adapter's gradients. May keep buffers between calls."""

    name: str
    exact: bool

    def reserve(self, model: Decoder, max_tokens: int, max_length: int) -> None:
        """Make buffers for batches of up to that many tokens and that longest sequence.

        Without it buffers grow with the batches that come, and old ones may leave holes behind.
        """

    def release(self) -> None:
        """Free what is kept between calls; the next call makes it again."""

    def step(
        self, model: Decoder, adapter: Adapter, batch: Batch, sink: GradSink, step: Step
    ) -> float:
        """Send every parameter's gradient to `sink`; a method that is not exact may leave some out.

        Args:
            model: the frozen model.
            adapter: the LoRA matrices.
            batch: sequences and labels.
            sink: takes each gradient as it comes.
            step: scale and dropout seed.

        Returns:
            The sum of the losses of the labelled positions, in nats.

        Raises:
            TrainingError: the loss is not finite; no gradient has reached the sink.
        """

    def loss(self, model: Decoder, adapter: Adapter | None, batch: Batch) -> float:
        """The sum of the losses without gradients and without dropout."""


def require_finite(losses: Tensor) -> float:
    """The sum of the losses, before any gradient of theirs is used.

    Args:
        losses: of any shape, in nats.

    Returns:
        Their sum.

    Raises:
        TrainingError: the sum is not finite.
    """
    total = float(losses.sum(dtype=losses.dtype))
    if not math.isfinite(total):
        raise TrainingError(
            f"the loss is {total}. Lower --learning-rate, and see that the weights hold no "
            "infinite or NaN values."
        )
    return total
