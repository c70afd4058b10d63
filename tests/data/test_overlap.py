"""Equal records are counted exactly, a part of them at a time."""

from __future__ import annotations

import numpy as np
import pytest

from lowtide.data import overlap


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 18])
def test_counts_are_those_of_sets(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_CHUNK", chunk)
    random = np.random.default_rng(0)
    pool = random.integers(0, 2**64, size=300, dtype=np.uint64)
    train, valid = random.choice(pool, 200), random.choice(pool, 40)
    assert overlap.repeated(train) == 200 - len(set(train.tolist()))
    assert overlap.shared(train, valid) == sum(one in set(train.tolist()) for one in valid.tolist())
    nothing = np.array([], dtype=np.uint64)
    assert overlap.repeated(nothing) == 0
    assert overlap.shared(nothing, valid) == overlap.shared(train, nothing) == 0
