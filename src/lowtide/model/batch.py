"""A batch: sequences laid end to end, with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.errors import DataError

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Token ids `(T,)`, what each position must predict `(T,)`, and the sequences' lengths.

    `targets` are labels already shifted: position t holds the label of t + 1, IGNORED (-100) where
    there is none. No padding exists.
    """

    ids: Tensor
    targets: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]] | None = None,
    ) -> Batch:
        """Lay sequences end to end.

        Args:
            sequences: token ids, at least one per sequence.
            labels: Hugging Face labels, same positions as the ids, -100 where nothing is learnt;
                None learns every token.

        Returns:
            The batch, with labels shifted by one within each sequence.

        Raises:
            DataError: there is no sequence, one is empty, labels do not match, or an id is
                negative.
        """
        if not sequences or any(len(sequence) == 0 for sequence in sequences):
            raise DataError("a batch needs at least one sequence, and each at least one token.")
        labels = sequences if labels is None else labels
        if [len(s) for s in sequences] != [len(s) for s in labels]:
            raise DataError(
                f"labels have lengths {[len(s) for s in labels]}, the sequences "
                f"{[len(s) for s in sequences]}; give one label per token (-100 to ignore it)."
            )
        ids = [token for sequence in sequences for token in sequence]
        targets = [t for row in labels for t in (*list(row)[1:], IGNORED)]
        batch = cls(
            torch.tensor(ids, dtype=torch.int64),
            torch.tensor(targets, dtype=torch.int64),
            tuple(len(sequence) for sequence in sequences),
        )
        if int(batch.ids.min()) < 0 or int(batch.targets.min()) < IGNORED:
            raise DataError("token ids must not be negative, and labels only where they are -100.")
        return batch

    @property
    def n_tokens(self) -> int:
        """Labelled positions, over which the mean loss is taken."""
        return int((self.targets != IGNORED).sum())

    @property
    def labelled(self) -> Tensor:
        """Positions that carry a label, `(n_tokens,)` int64."""
        return (self.targets != IGNORED).nonzero().squeeze(1)

    @property
    def largest_id(self) -> int:
        """The largest id among tokens and labels."""
        return max(int(self.ids.max()), int(self.targets.max()))
