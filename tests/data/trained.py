"""What an encoder marked as trained on."""

from __future__ import annotations

from lowtide.data.encode import Encoded


def trained_ids(encoded: Encoded) -> list[list[int]]:
    """The ids of each unbroken run of trained tokens."""
    runs: list[list[int]] = []
    previous = 0
    for token, flag in zip(encoded.ids, encoded.trained, strict=True):
        if flag and not previous:
            runs.append([])
        if flag:
            runs[-1].append(token)
        previous = flag
    return runs
