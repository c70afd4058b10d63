"""Records that occur more than once, found by their digests in bounded memory.

A digest has 64 bits: among n different records, two share one with a chance of n^2 / 2^65, which
is one in four million for three million records.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowtide.data.cache import TokenDataset

Digests = NDArray[np.uint64]
_CHUNK = 1 << 18


def repeated(digests: Digests) -> int:
    """How many records are equal to an earlier one.

    Args:
        digests: Of all records, mapped; so many are looked at in turn as share their first bits.

    Returns:
        The number of records less the number of different ones.
    """
    parts = 1
    while len(digests) > parts * _CHUNK // 2:
        parts *= 2
    shift = np.uint64(64 - (parts.bit_length() - 1))
    different = 0
    for part in range(parts):
        found = [
            chunk if parts == 1 else chunk[chunk >> shift == part] for chunk in _chunks(digests)
        ]
        different += len(np.unique(np.concatenate(found))) if found else 0
    return len(digests) - different


def shared(train: Digests, valid: Digests) -> int:
    """How many records of `valid` occur in `train`.

    Args:
        train: Digests of all records, mapped.
        valid: The same; held as a whole where it is small, else a part at a time.

    Returns:
        The number.
    """
    count = 0
    for wanted in _chunks(valid):
        seen = np.zeros(len(wanted), dtype=bool)
        for chunk in _chunks(train):
            seen |= np.isin(wanted, chunk)
        count += int(seen.sum())
    return count


def overlap_warning(train: TokenDataset, valid: TokenDataset) -> list[str]:
    """What to say of validation data that is trained on too.

    Args:
        train: The training data.
        valid: The validation data.

    Returns:
        One text, or none.
    """
    count = shared(train.digests, valid.digests)
    if not count:
        return []
    remedy = "Give data of its own with --valid-data, or hold some out with --valid-records."
    if count == len(valid):
        return [
            f"all {count:,} validation records are in the training data too: the validation loss "
            f"says nothing about text that was not trained on. {remedy}"
        ]
    return [
        f"{count:,} of {len(valid):,} validation records are in the training data too, so that "
        f"the validation loss comes out too low. {remedy}"
    ]


def _chunks(digests: Digests) -> list[Digests]:
    return [digests[start : start + _CHUNK] for start in range(0, len(digests), _CHUNK)]
