"""Dropout as a pure function: rate, tiling, determinism, independence."""

from __future__ import annotations

import math

import pytest
import torch

from lowtide.ops.dropout import dropout_scale


def _mask(rows: int, cols: int, p: float, seed: int, first_col: int = 0) -> torch.Tensor:
    return dropout_scale(torch.empty(rows, cols), p, seed, first_col)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 7, 2**61 - 1])
def test_rate_and_scale(p: float, seed: int) -> None:
    mask = _mask(400, 500, p, seed)
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    # A binomial of n draws strays from its mean by more than 5 sigma once in 2 million.
    kept = float((mask != 0).double().mean())
    assert abs(kept - (1 - p)) < 5 * math.sqrt(p * (1 - p) / mask.numel())
    # Rows and columns by themselves: the largest of 500 stays within 6 sigma.
    for dim, count in ((0, 400), (1, 500)):
        rates = (mask != 0).double().mean(dim)
        assert float((rates - (1 - p)).abs().max()) < 6 * math.sqrt(p * (1 - p) / count)


def test_nothing_is_dropped_at_zero() -> None:
    assert _mask(7, 11, 0.0, 3).eq(1).all()


def test_a_tile_has_the_whole_activations_mask() -> None:
    whole = _mask(13, 101, 0.3, 5)
    for start, stop in ((0, 1), (17, 50), (50, 101)):
        assert _mask(13, stop - start, 0.3, 5, start).equal(whole[:, start:stop])
    assert _mask(6, 101, 0.3, 5).equal(whole[:6])


def test_dtype_changes_the_scale_and_not_the_mask() -> None:
    single = dropout_scale(torch.empty(9, 20), 0.3, 5)
    double = dropout_scale(torch.empty(9, 20, dtype=torch.float64), 0.3, 5)
    assert double.dtype is torch.float64
    assert (single != 0).equal(double != 0)


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


@pytest.mark.parametrize("other", [1, 2, 2**31, 2**33 + 1, 0x9E3779B1])
def test_seeds_are_independent(other: int) -> None:
    a, b = _mask(300, 300, 0.5, 0), _mask(300, 300, 0.5, other)
    # The correlation of n independent pairs has standard deviation 1 / sqrt(n).
    assert abs(_correlation(a, b)) < 5 / 300


@pytest.mark.parametrize(("down", "right"), [(0, 1), (1, 0), (1, 1), (2, 3), (7, 64)])
def test_neighbours_are_independent(down: int, right: int) -> None:
    mask = _mask(300, 300, 0.5, 11)
    shifted = mask[down:, right:]
    here = mask[: 300 - down, : 300 - right]
    assert abs(_correlation(here, shifted)) < 5 / math.sqrt(shifted.numel())


def test_no_two_rows_or_columns_are_alike() -> None:
    mask = _mask(512, 512, 0.5, 3)
    assert len(mask.unique(dim=0)) == 512
    assert len(mask.unique(dim=1)) == 512
