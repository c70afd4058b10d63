"""What a frozen matrix tells of its use."""

from __future__ import annotations

from typing import Protocol


class Watch(Protocol):
    """Told what is about to be read of a matrix, so that its pages can be there and others not."""

    @property
    def max_rows(self) -> int:
        """Rows that may be read at once."""

    def reading(self, start: int) -> None:
        """Rows from `start`, at most `max_rows`, or all columns of some are about to be read."""

    def looked_up(self) -> None:
        """Single rows have been read, and are not needed again."""
