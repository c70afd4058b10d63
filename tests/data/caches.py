"""Token caches written from lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lowtide.data.cache import CacheWriter


def write_cache(path: Path, sequences: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Path:
    """Sequences of (ids, trained flags); the digest of each is its number."""
    path.parent.mkdir(exist_ok=True)
    with CacheWriter(path) as writer:
        for number, (ids, trained) in enumerate(sequences):
            writer.append(ids, trained, number)
        writer.commit()
    return path
