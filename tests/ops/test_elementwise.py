"""The exponential that stays out of the subnormal range."""

from __future__ import annotations

import pytest
import torch

from lowtide.ops.elementwise import exp_below_zero_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_exponential_down_to_where_nothing_counts(dtype: torch.dtype) -> None:
    x = torch.linspace(-80, 0, 1001, dtype=dtype)
    assert exp_below_zero_(x.clone()).equal(x.exp())
    far = torch.tensor([-90.0, -1e4, -torch.inf], dtype=dtype)
    tiny = exp_below_zero_(far.clone())
    assert bool((tiny >= torch.finfo(dtype).tiny).all())
    assert bool((tiny < 1e-34).all())


def test_nan_stays_nan() -> None:
    assert exp_below_zero_(torch.tensor([torch.nan, -1.0])).isnan().tolist() == [True, False]
