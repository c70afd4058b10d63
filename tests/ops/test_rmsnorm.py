"""RMSNorm forward and backward against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_noise_floor, randn, relative

from lowtide.ops.rmsnorm import rmsnorm_backward_, rmsnorm_forward, rmsnorm_gradient

# Sums of at most a few hundred float64 terms: eps sqrt(n) is about 1e-14; 1e-12 leaves room for
# cancellation and none for a wrong formula.
TOLERANCE = 1e-12
SHAPES = [(1, 2), (1, 74), (5, 37), (123, 111)]


def _ours(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dy: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.full_like(x, torch.nan)
    rstd = rmsnorm_forward(x, weight, eps, out=out)
    dx = residual.clone()
    scratch = torch.full_like(x, torch.nan)
    rmsnorm_backward_(dx, dy.clone(), x, weight, rstd, scratch=scratch)
    return out, dx


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_matches_autograd_in_float64(shape: tuple[int, int], eps: float) -> None:
    x, dy, residual = (randn(*shape, seed=i) for i in range(3))
    weight = 1 + 0.5 * randn(shape[1], seed=3)
    out, dx = _ours(x, weight, eps, dy, residual)

    leaf = x.clone().requires_grad_()
    truth = F.rms_norm(leaf, (shape[1],), weight, eps)
    (gradient,) = torch.autograd.grad(truth, leaf, dy)
    assert relative(out, truth) < TOLERANCE
    assert relative(dx, residual + gradient) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_alone_is_the_same_in_another_tensor_or_in_place(
    shape: tuple[int, int],
) -> None:
    x, dy = (randn(*shape, seed=i) for i in range(2))
    weight = 1 + 0.5 * randn(shape[1], seed=3)
    _, dx = _ours(x, weight, 1e-6, dy, torch.zeros_like(x))
    rstd = rmsnorm_forward(x, weight, 1e-6, out=torch.empty_like(x))
    out, before = torch.full_like(x, torch.nan), dy.clone()
    rmsnorm_gradient(dy, x, weight, rstd, out=out)
    assert dy.equal(before)
    assert relative(out, dx) < TOLERANCE
    rmsnorm_gradient(dy, x, weight, rstd, out=dy)
    assert dy.equal(out)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_float32_is_as_close_as_the_plain_formula(shape: tuple[int, int], size: float) -> None:
    x, dy = randn(*shape).float() * size, randn(*shape, seed=1).float()
    weight = (1 + 0.5 * randn(shape[1], seed=3)).float()
    out, dx = _ours(x, weight, 1e-6, dy, torch.zeros_like(x))

    def plain(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.clone().to(dtype).requires_grad_()
        y = F.rms_norm(leaf, (shape[1],), weight.to(dtype), 1e-6)
        return y.detach(), torch.autograd.grad(y, leaf, dy.to(dtype))[0]

    (truth, truth_dx), (naive, naive_dx) = plain(torch.float64), plain(torch.float32)
    assert_noise_floor(out, naive, truth, truth.abs())
    # dx is a difference of two terms of size |w dy| rstd.
    rstd = x.double().square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    magnitude = rstd * (weight * dy).double().abs().amax(-1, keepdim=True)
    assert_noise_floor(dx, naive_dx, truth_dx, magnitude)


def test_a_row_of_zeros_stays_finite() -> None:
    x = torch.zeros(3, 10)
    out, dx = _ours(x, torch.ones(10), 1e-6, torch.ones(3, 10), torch.zeros(3, 10))
    assert out.eq(0).all()
    assert torch.isfinite(dx).all()
