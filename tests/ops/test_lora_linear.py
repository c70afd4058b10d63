"""LoRA linear, tile by tile of the frozen weight, against autograd on the plain formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_noise_floor, frozen, randn, relative
from torch import Tensor

from lowtide.ops.dropout import dropout_scale
from lowtide.ops.frozen import spans
from lowtide.ops.lora_linear import Linear, Lora, linear_backward, linear_forward

TOLERANCE = 1e-12  # float64 sums of a few hundred terms round at 1e-14
TOKENS, INNER, OUTER = 5, 37, 74


def _linear(
    rank: int | None, bias: bool, dropout: float, stored: torch.dtype, dtype: torch.dtype
) -> tuple[Linear, Tensor]:
    """A linear and its whole weight in the compute dtype."""
    weight = randn(OUTER, INNER, seed=1, dtype=stored)
    lora = None
    if rank is not None:
        a, b = randn(rank, INNER, seed=2, dtype=dtype), randn(OUTER, rank, seed=3, dtype=dtype)
        lora = Lora(a, b, 16.0 / rank, dropout, seed=12345)
    linear = Linear(
        frozen(weight, dtype), randn(OUTER, seed=4, dtype=dtype) if bias else None, lora
    )
    return linear, weight.to(dtype)


def _plain(x: Tensor, weight: Tensor, linear: Linear, a: Tensor, b: Tensor) -> Tensor:
    lora = linear.lora
    assert lora is not None
    mask = dropout_scale(x, lora.dropout, lora.seed)
    return F.linear(x, weight, linear.bias) + lora.scale * ((x * mask) @ a.t()) @ b.t()


def _ours(
    x: Tensor, dy: Tensor, linear: Linear, tile_rows: int, residual: Tensor, dx_start: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, dx, dA, dB; buffers start as NaN, `dy` and `x` must stay as they were."""
    tile = torch.full((tile_rows * INNER,), torch.nan, dtype=x.dtype)
    before = x.clone(), dy.clone()
    y = residual.clone()
    linear_forward(x, linear, y, tile, beta=1.0)
    overwritten = torch.full_like(y, torch.nan)
    linear_forward(x, linear, overwritten, tile)
    assert relative(overwritten + residual, y) < 1e-6
    emitted: list[tuple[Tensor, Tensor]] = []
    dx = dx_start.clone()
    linear_backward(dy, x, linear, dx, tile, emit=lambda da, db: emitted.append((da, db)))
    assert x.equal(before[0])
    assert dy.equal(before[1])
    (da, db) = emitted[0]
    assert len(emitted) == 1
    return y, dx, da, db


@pytest.mark.parametrize("tile_rows", [1, 3, 50, OUTER])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_matches_autograd_in_float64(
    stored: torch.dtype, rank: int, dropout: float, tile_rows: int
) -> None:
    linear, weight = _linear(rank, rank != 8, dropout, stored, torch.float64)
    assert linear.lora is not None
    x, dy = randn(TOKENS, INNER), randn(TOKENS, OUTER, seed=5)
    residual, dx_start = randn(TOKENS, OUTER, seed=6), randn(TOKENS, INNER, seed=7)
    ours = _ours(x, dy, linear, tile_rows, residual, dx_start)

    leaves = [t.clone().requires_grad_() for t in (x, linear.lora.a, linear.lora.b)]
    y = _plain(leaves[0], weight, linear, *leaves[1:])
    dx, da, db = torch.autograd.grad(y, leaves, dy)
    for mine, truth in zip(ours, (residual + y, dx_start + dx, da, db), strict=True):
        assert relative(mine, truth) < TOLERANCE


@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_float32_is_as_close_as_the_plain_formula(rank: int, dropout: float) -> None:
    x, dy = randn(123, INNER).float(), randn(123, OUTER, seed=5).float()
    linear, _ = _linear(rank, True, dropout, torch.bfloat16, torch.float32)
    zeros = torch.zeros(123, OUTER), torch.zeros(123, INNER)
    ours = _ours(x, dy, linear, 11, *zeros)

    def plain(dtype: torch.dtype) -> list[Tensor]:
        wide, weight = _linear(rank, True, dropout, torch.bfloat16, dtype)
        assert linear.lora is not None
        assert wide.lora is not None
        assert wide.bias is not None
        assert linear.bias is not None
        # The same float32 numbers in both dtypes.
        wide = wide._replace(bias=linear.bias.to(dtype))
        leaves = [t.clone().to(dtype).requires_grad_() for t in (x, linear.lora.a, linear.lora.b)]
        y = _plain(leaves[0], weight, wide, *leaves[1:])
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    for mine, naive, truth in zip(ours, plain(torch.float32), plain(torch.float64), strict=True):
        assert_noise_floor(mine, naive, truth, float(truth.abs().max()))


def test_without_an_adapter_it_is_the_frozen_linear_and_emits_nothing() -> None:
    linear, weight = _linear(None, True, 0.0, torch.float16, torch.float64)
    x, dy = randn(TOKENS, INNER), randn(TOKENS, OUTER, seed=5)
    tile = torch.empty(7 * INNER, dtype=torch.float64)
    y, dx = torch.empty(TOKENS, OUTER, dtype=x.dtype), torch.zeros_like(x)
    linear_forward(x, linear, y, tile)

    def refuse(da: Tensor, db: Tensor) -> None:
        raise AssertionError("there is nothing to emit")

    linear_backward(dy, x, linear, dx, tile, emit=refuse)
    assert relative(y, F.linear(x, weight, linear.bias)) < TOLERANCE
    assert relative(dx, dy @ weight) < TOLERANCE


def test_the_input_gradient_can_be_left_out() -> None:
    linear, _ = _linear(8, False, 0.3, torch.float32, torch.float64)
    x, dy = randn(TOKENS, INNER), randn(TOKENS, OUTER, seed=5)
    tile = torch.empty(7 * INNER, dtype=torch.float64)
    seen: list[tuple[Tensor, Tensor]] = []
    for dx in (torch.zeros_like(x), None):
        linear_backward(dy, x, linear, dx, tile, emit=lambda da, db: seen.append((da, db)))
    assert all(a.equal(b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("total", [1, 7, 64, 131])
@pytest.mark.parametrize("step", [1, 2, 7, 63, 64, 200])
def test_spans_cover_everything_once_in_steps(total: int, step: int) -> None:
    cut = spans(total, step)
    assert [i for start, stop in cut for i in range(start, stop)] == list(range(total))
    assert all(0 < stop - start <= step for start, stop in cut)
