"""JSON lines that a run wrote, or was writing when it was stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_LONGEST = 1 << 20
"""Characters of a line; a longer one is damage, such as a disk's zeros."""


class Lines:
    """The objects in a file of JSON lines; what is no object is counted and left out.

    Attributes:
        damaged: lines left out so far.
    """

    def __init__(self, path: Path) -> None:
        """Nothing is opened yet.

        Args:
            path: need not exist, which is as if it were empty.
        """
        self._path = path
        self.damaged = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """One object per good line, in their order, in the memory of one line."""
        try:
            file = open(self._path, encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        with file:
            whole = True
            while line := file.readline(_LONGEST):
                good = whole
                whole = line.endswith("\n")
                if not line.strip():
                    continue
                entry = _parsed(line) if good and (whole or len(line) < _LONGEST) else None
                if entry is not None:
                    yield entry
                elif good:
                    self.damaged += 1


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def number(entry: dict[str, Any], key: str) -> float | None:
    """A finite number of an entry, or None where it is something else."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def finite(value: Any) -> Any:
    """The same, with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value
