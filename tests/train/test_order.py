"""The order of the records: every pass whole, from the seed, and to be taken up anywhere."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from lowtide.train.order import BatchRule, Permutation, RecordOrder

SEED = 2**63 - 1
RULES = [
    BatchRule(1, SEED),
    BatchRule(4, SEED),
    BatchRule(4, SEED, group_by_length=True),
    BatchRule(4, SEED, token_budget=64),
]


class Records:
    """Lengths in memory."""

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = np.array(lengths)
        self.longest = int(self._lengths.max())

    def __len__(self) -> int:
        return len(self._lengths)

    def lengths_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._lengths[indices]


def some_records(count: int, longest: int = 40) -> Records:
    return Records([2 + i * i % (longest - 1) for i in range(count)])


def take_pass(order: RecordOrder, count: int) -> list[list[int]]:
    batches: list[list[int]] = []
    while sum(map(len, batches)) < count:
        batches.append(order.take())
    return batches


@pytest.mark.parametrize("count", [1, 2, 3, 8, 63, 64, 65, 1000, 4097])
def test_a_permutation_holds_every_place_once(count: int) -> None:
    places = np.arange(count)
    values = Permutation(count, SEED, 3).at(places)
    assert sorted(values) == list(range(count))
    again = Permutation(count, SEED, 3)
    assert [int(again.at(places[i : i + 1])[0]) for i in range(min(count, 50))] == list(values[:50])
    if count > 8:
        others = Permutation(count, SEED, 4).at(places), Permutation(count, 0, 3).at(places)
        assert all((other != values).any() for other in others)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_all_permutations_of_few_places_are_alike(count: int) -> None:
    """Chi-squared over 12,000 seeds; the bound is passed by one fair shuffle in a million."""
    places, draws = np.arange(count), 12_000
    seen = Counter(tuple(Permutation(count, seed).at(places)) for seed in range(draws))
    kinds = math.factorial(count)
    expected = draws / kinds
    squared = sum((seen[kind] - expected) ** 2 / expected for kind in seen)
    assert len(seen) == kinds
    assert squared < {2: 23.9, 6: 35.9, 24: 71.4}[kinds]


def test_neighbours_do_not_stay_neighbours() -> None:
    """Of a fair shuffle of 10,000, two places in a row differ by one twice on average."""
    values = Permutation(10_000, SEED).at(np.arange(10_000))
    assert sum(abs(int(a) - int(b)) == 1 for a, b in pairwise(values)) < 12
    half = values[:5000] < 5000
    assert abs(int(half.sum()) - 2500) < 5 * math.sqrt(10_000 / 16)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 10, 5000])
def test_every_pass_over_the_records_has_an_order_of_its_own(rule: BatchRule, count: int) -> None:
    records = some_records(count)
    order = RecordOrder(records, rule)
    passes = [take_pass(order, count) for _ in range(3)]
    for epoch, batches in enumerate(passes):
        assert sorted(i for batch in batches for i in batch) == list(range(count))
        assert order.batches_in(epoch) == len(batches)
    if count > 3:
        assert passes[0] != passes[1] != passes[2] != passes[0]
    again = RecordOrder(records, rule)
    assert [take_pass(again, count) for _ in range(3)] == passes
    other = BatchRule(rule.batch_size, 1, rule.token_budget, rule.group_by_length)
    assert count < 10 or take_pass(RecordOrder(records, other), count) != passes[0]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("taken", [0, 3, 4, 5, 300, 700])
def test_an_order_goes_on_from_any_position(rule: BatchRule, taken: int) -> None:
    records = some_records(1001)
    order = RecordOrder(records, rule)
    for _ in range(taken):
        order.take()
    again = RecordOrder(records, rule)
    again.seek(order.position())
    assert again.position() == order.position()
    assert [again.take() for _ in range(300)] == [order.take() for _ in range(300)]


def test_positions_of_other_rules_and_other_data() -> None:
    shorter, whole = (RecordOrder(some_records(4), BatchRule(2, 1)) for _ in range(2))
    shorter.seek({"epoch": 2, "offset": 9})
    for _ in range(6):
        whole.take()
    assert whole.position() == {"epoch": 2, "offset": 4} == shorter.position()
    assert shorter.take() == whole.take()
    order = RecordOrder(some_records(1000), BatchRule(8, 1))
    order.seek({"epoch": 1, "offset": 12})
    assert order.position() == {"epoch": 1, "offset": 16}


def test_packed_batches_fill_the_budget_and_never_exceed_it() -> None:
    records = some_records(10_000, longest=300)
    order = RecordOrder(records, BatchRule(token_budget=512))
    batches = take_pass(order, 10_000)
    tokens = [int(records.lengths_of(np.array(batch)).sum()) for batch in batches]
    assert max(tokens) <= 512
    assert sum(tokens) / len(tokens) > 0.98 * 512
    assert sum(t < 480 for t in tokens) <= 3, "a window may end with one that is not full"
    largest = order.largest()
    assert (sum(largest), max(largest)) == (512, records.longest)


def test_records_of_similar_length_share_a_batch() -> None:
    records = some_records(10_000, longest=300)

    def spread(rule: BatchRule) -> float:
        batches = take_pass(RecordOrder(records, rule), 10_000)
        return float(np.mean([np.ptp(records.lengths_of(np.array(batch))) for batch in batches]))

    assert spread(BatchRule(8, group_by_length=True)) < spread(BatchRule(8)) / 20
    firsts = [
        int(records.lengths_of(np.array(batch)).max())
        for batch in take_pass(RecordOrder(records, BatchRule(8, group_by_length=True)), 10_000)
    ]
    assert firsts[:64] not in (sorted(firsts[:64]), sorted(firsts[:64])[::-1]), "shuffled batches"


def test_the_largest_batch_bounds_all() -> None:
    for rule in RULES:
        for count in (1, 3, 50):
            records = some_records(count)
            order = RecordOrder(records, rule)
            lengths = [records.lengths_of(np.array(b)) for b in take_pass(order, count)]
            largest = order.largest()
            assert sum(largest) >= max(one.sum() for one in lengths)
            assert max(largest) == records.longest


def test_a_billion_records_take_no_memory() -> None:
    class Many(Records):
        def __len__(self) -> int:
            return 10**9

        def lengths_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
            return 2 + indices % 300

    many = Many([301])
    tracemalloc.start()
    for rule in (BatchRule(8), BatchRule(8, group_by_length=True), BatchRule(token_budget=900)):
        order = RecordOrder(many, rule)
        order.seek({"epoch": 7, "offset": 987_654_321})
        for _ in range(200):
            order.take()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000
