"""A curve in one line of text."""

from __future__ import annotations

import math

_BLOCKS, _PLAIN = "▁▂▃▄▅▆▇█", "_.-~=+*#"


class Trace:
    """A column of any length, kept as the means of at most `room` equal parts."""

    def __init__(self, room: int = 64) -> None:
        """Nothing is in it yet.

        Args:
            room: parts that are kept at most; even.
        """
        self._room, self._span = room, 1
        self._means: list[float] = []
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """One more value; what is not finite is left out."""
        if not math.isfinite(value):
            return
        self._sum += value
        self._count += 1
        if self._count == self._span:
            self._means.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
        if len(self._means) == self._room:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(a + b) / 2 for a, b in pairs]
            self._span *= 2

    def line(self, width: int, plain: bool = False) -> str:
        """The curve, from its lowest to its highest.

        Args:
            width: characters at most.
            plain: in ASCII.

        Returns:
            One character for each part, or for several where they are more than the width.
        """
        values = list(self._means)
        if self._count and (self._count * 2 >= self._span or not values):
            values.append(self._sum / self._count)
        if not values or width < 1:
            return ""
        parts = min(width, len(values))
        shown = []
        for n in range(parts):
            group = values[len(values) * n // parts : len(values) * (n + 1) // parts]
            shown.append(sum(group) / len(group))
        low, high = min(shown), max(shown)
        signs = _PLAIN if plain else _BLOCKS
        scale = (len(signs) - 1) / (high - low) if high > low else 0.0
        return "".join(signs[round((value - low) * scale)] for value in shown)
