"""In which order the records are trained on, and how far a run has come in it."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class RecordOrder:
    """Each pass over the records in an order of its own, which follows from the seed and the pass.

    So the position is two numbers, and going on from one costs as much as starting.
    """

    def __init__(self, count: int, seed: int) -> None:
        """Start at the first pass.

        Args:
            count: how many records there are, at least 1.
            seed: of all orders.
        """
        self._count, self._seed = count, seed
        self.seek({"epoch": 0, "offset": 0})

    def take(self, count: int) -> list[int]:
        """The indices of the next `count` records."""
        taken: list[int] = []
        while len(taken) < count:
            if self._offset == self._count:
                self.seek({"epoch": self._epoch + 1, "offset": 0})
            chosen = self._order[self._offset : self._offset + count - len(taken)].tolist()
            self._offset += len(chosen)
            taken += chosen
        return taken

    def position(self) -> dict[str, int]:
        """What `seek` goes on from: the pass, from 0, and how many of its records were taken."""
        return {"epoch": self._epoch, "offset": self._offset}

    def seek(self, position: Mapping[str, int]) -> None:
        """Go on from a position.

        Args:
            position: what `position` said. An offset behind the last record, as when the data has
                become shorter, is the end of its pass.
        """
        self._epoch = position["epoch"]
        self._offset = min(position["offset"], self._count)
        seed = (self._seed * 1_000_003 + self._epoch) * 0x9E3779B1
        generator = torch.Generator().manual_seed(seed & (1 << 63) - 1)
        self._order = torch.randperm(self._count, generator=generator)
