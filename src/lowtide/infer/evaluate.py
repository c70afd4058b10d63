"""Loss and perplexity of a data set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import TrainingError
from lowtide.methods import Method
from lowtide.model.adapter import Adapter
from lowtide.model.batch import Batch
from lowtide.model.decoder import Decoder
from lowtide.notebook import table


class Sequences(Protocol):
    """What a data set must offer; `data.cache.TokenDataset` does."""

    def __len__(self) -> int:
        """Number of sequences."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""

    def lengths_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each of these sequences."""

    def sequence(self, i: int) -> tuple[list[int], list[int]]:
        """Ids and labels of one sequence."""


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats per labelled token, and over how many."""

    loss: float
    n_tokens: int

    @property
    def perplexity(self) -> float:
        """`exp(loss)`."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def _repr_html_(self) -> str:
        rows = [("loss", f"{self.loss:.4f}"), ("perplexity", f"{self.perplexity:,.2f}")]
        return table("an evaluation", [*rows, ("tokens", f"{self.n_tokens:,}")])


def batch_of(dataset: Sequences, indices: Sequence[int]) -> Batch:
    """The sequences of those indices as one batch."""
    rows = [dataset.sequence(i) for i in indices]
    return Batch.from_sequences([ids for ids, _ in rows], [labels for _, labels in rows])


def batches_in_order(dataset: Sequences, batch_size: int) -> Iterator[Batch]:
    """The whole data set, in order."""
    for start in range(0, len(dataset), batch_size):
        yield batch_of(dataset, range(start, min(start + batch_size, len(dataset))))


def evaluate(
    model: Decoder,
    adapter: Adapter | None,
    dataset: Sequences,
    method: Method,
    *,
    batch_size: int = 1,
    max_batches: int = 0,
) -> Evaluation:
    """Mean loss over the data set, without dropout.

    Args:
        model: the frozen model.
        adapter: LoRA matrices, or None for the base model.
        dataset: sequences and labels.
        method: computes the loss; `mesp` does it in the memory of a forward pass.
        batch_size: sequences at a time; the result does not depend on it.
        max_batches: stop after this many; 0 takes all.

    Returns:
        The loss and the number of labelled tokens.

    Raises:
        TrainingError: the loss is not finite.
    """
    total, count = 0.0, 0
    for number, batch in enumerate(batches_in_order(dataset, batch_size), 1):
        if batch.n_tokens:
            total += method.loss(model, adapter, batch)
            count += batch.n_tokens
        if number == max_batches:
            break
    loss = total / max(1, count)
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss on this data is {loss}: the weights or the adapter hold values that "
            "overflow. Train the adapter again with a lower --learning-rate; if the model alone "
            "does this too, its weights are broken."
        )
    return Evaluation(loss, count)
