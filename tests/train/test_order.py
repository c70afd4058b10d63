"""The order of the records: every pass whole, from the seed, and to be taken up anywhere."""

from __future__ import annotations

import pytest

from lowtide.train.order import RecordOrder


def test_every_pass_over_the_records_has_an_order_of_its_own() -> None:
    order = RecordOrder(10, seed=5)
    passes = [order.take(10) for _ in range(3)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert RecordOrder(10, seed=5).take(30) == [one for order in passes for one in order]
    assert RecordOrder(10, seed=6).take(10) != passes[0]
    assert len({tuple(RecordOrder(10, seed).take(10)) for seed in range(50)}) == 50


@pytest.mark.parametrize("taken", [0, 3, 10, 11, 29, 40])
def test_an_order_goes_on_from_any_position(taken: int) -> None:
    order = RecordOrder(10, seed=2**63 - 1)
    order.take(taken)
    position = order.position()
    again = RecordOrder(10, seed=2**63 - 1)
    again.seek(position)
    assert again.take(25) == order.take(25)


def test_a_position_behind_the_last_record_is_the_end_of_its_pass() -> None:
    shorter, whole = RecordOrder(4, seed=1), RecordOrder(4, seed=1)
    shorter.seek({"epoch": 2, "offset": 9})
    whole.take(12)
    assert shorter.take(4) == whole.take(4)
