"""Which records each batch holds: a new order in every pass, decided by the seed, in no list.

The order of a pass is a permutation of [0, n) that is computed place by place: a Feistel network
over a power of four, walked until it lands below n (Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002). A billion records take no more memory than ten.

A pass is cut into windows of that order, and each window into batches by a `BatchRule`. So where a
run is, is two numbers, and going back there means to plan one window again.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from lowtide.errors import ConfigError

if TYPE_CHECKING:
    from .settings import TrainSettings

Indices = NDArray[np.int64]

_ROUNDS = 8
_PACKING_WINDOW = 4096
_GROUPED_BATCHES = 64
_LEAST_WINDOWS = 4


class Permutation:
    """A pseudo-random permutation of [0, count) in constant memory.

    Args:
        count: How many places there are.
        *key: Whole numbers that decide it, such as a seed and the number of a pass.
    """

    def __init__(self, count: int, *key: int) -> None:
        self._count = count
        half = max(3, ((count - 1).bit_length() + 1) // 2)
        self._half, self._mask = np.uint64(half), np.uint64((1 << half) - 1)
        packed = b"".join(part.to_bytes(16, "little", signed=True) for part in key)
        digest = blake2b(packed, digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def at(self, places: Indices) -> Indices:
        """What stands at these places.

        Args:
            places: Each in [0, count).

        Returns:
            As many numbers in [0, count), different for different places.
        """
        values = self._shuffled(places.astype(np.uint64))
        while (outside := np.flatnonzero(values >= self._count)).size:
            values[outside] = self._shuffled(values[outside])
        return values.astype(np.int64)

    def _shuffled(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """One permutation of the whole power of four."""
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right + key) & self._mask)
        return (left << self._half) | right


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014), modulo 2^64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Lengths(Protocol):
    """What a data set must offer to be put in order."""

    def __len__(self) -> int:
        """Number of sequences."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""

    def lengths_of(self, indices: Indices) -> Indices:
        """Tokens of each of these sequences."""


@dataclass(frozen=True)
class BatchRule:
    """How records become batches."""

    batch_size: int = 1
    seed: int = 0
    token_budget: int | None = None
    """Packing: fill each batch with whole records up to this many tokens; `batch_size` is not
    looked at. At least the longest record."""
    group_by_length: bool = False
    """Records of similar length share a batch."""

    def window(self, count: int) -> int:
        """Records that are planned together, of `count`."""
        if self.token_budget is not None:
            return _PACKING_WINDOW
        # As many windows as keep small data sets from making the same batches in every pass.
        batches = max(1, min(_GROUPED_BATCHES, count // (self.batch_size * _LEAST_WINDOWS)))
        return self.batch_size * batches


class RecordOrder:
    """An endless stream of batches, each a list of indices; every pass holds each record once.

    The last batch of a pass may be smaller. Where a run is, is two numbers.
    """

    def __init__(self, dataset: Lengths, rule: BatchRule) -> None:
        """Start at the first pass.

        Args:
            dataset: what is put in order, at least one record.
            rule: how.
        """
        self._dataset, self._rule = dataset, rule
        self._count = len(dataset)
        self._window = rule.window(self._count)
        self._epoch = self._offset = 0
        self._ready: list[Indices] = []
        """Batches left of the window that the offset is in, the next one last."""

    def take(self) -> list[int]:
        """The indices of the next batch."""
        if self._offset == self._count:
            self._epoch, self._offset = self._epoch + 1, 0
        if not self._ready:
            self._ready = self._planned(self._epoch, self._offset)
        batch = self._ready.pop()
        self._offset += len(batch)
        return [int(index) for index in batch]

    def position(self) -> dict[str, int]:
        """What `seek` goes on from: the pass, from 0, and how many of its records were taken."""
        return {"epoch": self._epoch, "offset": self._offset}

    def seek(self, position: Mapping[str, int]) -> None:
        """Go on from a position.

        Args:
            position: what `position` said. Where it was taken with another rule, the next batch is
                the first that begins at or behind it. An offset behind the last record, as when the
                data has become shorter, is the end of its pass.
        """
        self._epoch, target = position["epoch"], min(position["offset"], self._count)
        self._offset, self._ready = target - target % self._window, []
        while self._offset < target:
            self.take()

    def largest(self) -> tuple[int, ...]:
        """Lengths of a batch that no batch exceeds, in tokens or in its longest sequence."""
        longest, budget = self._dataset.longest, self._rule.token_budget
        if budget is None:
            budget = longest * self._rule.batch_size
        return filled(longest, min(budget, longest * self._count))

    def batches_in(self, epoch: int) -> int:
        """How many batches a pass has; packing plans all of it to know.

        Args:
            epoch: The pass.

        Returns:
            The number of batches.
        """
        if self._rule.token_budget is None:
            return -(-self._count // self._rule.batch_size)
        starts = range(0, self._count, self._window)
        return sum(len(self._planned(epoch, start)) for start in starts)

    def _planned(self, epoch: int, start: int) -> list[Indices]:
        """The batches of the window that begins at `start`, the first one last."""
        rule = self._rule
        places = np.arange(start, min(start + self._window, self._count), dtype=np.int64)
        records = Permutation(self._count, rule.seed, epoch).at(places)
        if rule.token_budget is not None:
            batches = _packed(records, self._dataset.lengths_of(records), rule.token_budget)
        elif rule.group_by_length:
            lengths = self._dataset.lengths_of(records)
            batches = _chunks(records[np.argsort(lengths, kind="stable")], rule.batch_size)
        else:
            return _chunks(records, rule.batch_size)[::-1]
        shuffled = Permutation(len(batches), rule.seed, epoch, start)
        return [batches[i] for i in shuffled.at(np.arange(len(batches), dtype=np.int64))]


def batch_rule(settings: TrainSettings) -> BatchRule:
    """How the settings make batches of records."""
    budget = settings.batch_size * settings.max_seq_length if settings.packing else None
    return BatchRule(settings.batch_size, settings.seed, budget, settings.group_by_length)


def batches_of_epochs(settings: TrainSettings, dataset: Lengths) -> float:
    """How many batches `epochs` passes have. With packing each pass has a number of its own.

    Args:
        settings: of the run.
        dataset: its records.

    Returns:
        Batches of the whole passes, and the share of those of the last one; 0 without `epochs`.
    """
    if settings.epochs is None:
        return 0
    order, whole = RecordOrder(dataset, batch_rule(settings)), int(settings.epochs)
    if not settings.packing:
        return settings.epochs * order.batches_in(0)
    share = settings.epochs - whole
    rest = share * order.batches_in(whole) if share else 0.0
    return sum(order.batches_in(epoch) for epoch in range(whole)) + rest


def largest_batch(
    settings: TrainSettings, train: Lengths, valid: Lengths | None
) -> tuple[int, ...]:
    """Lengths of a batch that none of a run exceeds, in tokens or in its longest sequence.

    Args:
        settings: of the run.
        train: sequences to learn.
        valid: sequences to validate on, `batch_size` at a time.

    Returns:
        Tokens of each of its sequences.
    """
    largest = RecordOrder(train, batch_rule(settings)).largest()
    if valid is None:
        return largest
    tokens = valid.longest * min(settings.batch_size, len(valid))
    return filled(max(largest[0], valid.longest), max(sum(largest), tokens))


def check_batches(settings: TrainSettings) -> None:
    """Refuse what would be ignored.

    Args:
        settings: of the run.

    Raises:
        ConfigError: names the setting.
    """
    if settings.packing and settings.group_by_length:
        raise ConfigError(
            "--packing fills batches with records of all lengths, --group-by-length sorts them. "
            "Give one of them."
        )
    if settings.group_by_length and settings.batch_size == 1:
        raise ConfigError(
            "--group-by-length says which records share a batch, and with --batch-size 1 none do. "
            "Raise it, or leave --group-by-length out."
        )


def filled(longest: int, tokens: int) -> tuple[int, ...]:
    """Sequences of `longest` tokens, and a shorter one, that hold so many tokens together."""
    rest = tokens % longest
    return (longest,) * (tokens // longest) + ((rest,) if rest else ())


def _chunks(records: Indices, size: int) -> list[Indices]:
    return [records[start : start + size] for start in range(0, len(records), size)]


def _packed(records: Indices, lengths: Indices, budget: int) -> list[Indices]:
    """Records in batches of up to `budget` tokens: the longest first, each where it fits best."""
    batches: list[list[int]] = []
    room: list[tuple[int, int]] = []
    """(tokens that are left, batch), sorted."""
    for place in np.argsort(-lengths, kind="stable"):
        length = int(lengths[place])
        at = bisect_left(room, (length, -1))
        if at < len(room):
            left, batch = room.pop(at)
        else:
            left, batch = budget, len(batches)
            batches.append([])
        batches[batch].append(int(records[place]))
        insort(room, (left - length, batch))
    return [np.array(batch, dtype=np.int64) for batch in batches]
