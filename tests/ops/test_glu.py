"""The MLP in tiles of its intermediate size against autograd on the whole of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_noise_floor, frozen, randn, relative
from torch import Tensor

from lowtide.ops.dropout import dropout_scale
from lowtide.ops.glu import Glu, GluBuffers, glu_backward, glu_forward
from lowtide.ops.lora_linear import Linear, Lora

TOLERANCE = 1e-12  # float64 sums of a few hundred terms round at 1e-14
HIDDEN, INNER = 37, 74
NAMES = ("gate", "up", "down")


def _mlp(
    rank: int,
    adapted: str,
    dropout: float = 0.0,
    bias: bool = False,
    stored: torch.dtype = torch.float64,
    dtype: torch.dtype = torch.float64,
    activation: str = "silu",
) -> tuple[Glu, list[Tensor]]:
    """An MLP and its three whole weights in the compute dtype."""
    linears, weights = [], []
    for i, name in enumerate(NAMES):
        out, inner = (HIDDEN, INNER) if name == "down" else (INNER, HIDDEN)
        weight = (randn(out, inner, seed=10 * i) * inner**-0.5).to(stored)
        lora = None
        if name in adapted:
            a = randn(rank, inner, seed=10 * i + 1, dtype=dtype) * inner**-0.5
            b = randn(out, rank, seed=10 * i + 2, dtype=dtype)
            lora = Lora(a, b, 2.0 / rank, dropout, seed=777 + i)
        offset = randn(out, seed=10 * i + 3, dtype=dtype) if bias else None
        linears.append(Linear(frozen(weight, dtype), offset, lora))
        weights.append(weight.to(dtype))
    return Glu(*linears, activation), weights


def _plain(n: Tensor, mlp: Glu, weights: list[Tensor], matrices: list[Tensor]) -> Tensor:
    """The formula on whole matrices; `matrices` are A and B of the adapted linears in order."""
    left = iter(matrices)

    def linear(i: int, x: Tensor) -> Tensor:
        y = F.linear(x, weights[i], mlp[:3][i].bias)
        lora = mlp[:3][i].lora
        if lora is None:
            return y
        a, b = next(left), next(left)
        return y + lora.scale * ((x * dropout_scale(x, lora.dropout, lora.seed)) @ a.t()) @ b.t()

    gate = linear(0, n)
    act = F.silu(gate) if mlp.activation == "silu" else F.gelu(gate, approximate="tanh")
    return linear(2, act * linear(1, n))


def _matrices(mlp: Glu) -> list[Tensor]:
    return [m for linear in mlp[:3] if linear.lora is not None for m in linear.lora[:2]]


def _ours(
    n: Tensor, dy: Tensor, mlp: Glu, width: int, residual: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, dn and the adapters' gradients. Buffers start as NaN; inputs must stay as they were."""
    nans = torch.full((width * max(HIDDEN, len(n)),), torch.nan, dtype=n.dtype)
    buffers = GluBuffers(
        tiles=[nans[: width * HIDDEN].clone() for _ in range(2)],
        activations=[nans[: width * len(n)].clone() for _ in range(4)],
        width=width,
    )
    before = n.clone(), dy.clone()
    y = residual.clone()
    glu_forward(n, mlp, y, buffers)
    dn = torch.full_like(n, torch.nan)
    grads: dict[str, list[Tensor]] = {}
    emits = [
        lambda da, db, name=name: grads.setdefault(name, []).extend((da, db)) for name in NAMES
    ]
    glu_backward(dy, n, mlp, dn, buffers, emits=emits)
    assert n.equal(before[0])
    assert dy.equal(before[1])
    return y, dn, [g for name in NAMES for g in grads.get(name, [])]


@pytest.mark.parametrize("width", [1, 7, 50, INNER])
@pytest.mark.parametrize(
    ("rank", "adapted", "dropout", "bias", "stored"),
    [
        (8, "gate up down", 0.0, False, torch.float64),
        (1, "gate up down", 0.3, True, torch.bfloat16),
        (64, "gate up down", 0.3, False, torch.float16),
        (3, "down", 0.0, True, torch.float32),
        (3, "gate", 0.3, False, torch.bfloat16),
        (3, "up", 0.0, False, torch.float64),
        (1, "", 0.0, True, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 5])
def test_matches_autograd_in_float64_at_every_width(
    tokens: int,
    rank: int,
    adapted: str,
    dropout: float,
    bias: bool,
    stored: torch.dtype,
    width: int,
) -> None:
    mlp, weights = _mlp(rank, adapted, dropout, bias, stored)
    n, dy, residual = (randn(tokens, HIDDEN, seed=i) for i in range(3))
    y, dn, grads = _ours(n, dy, mlp, width, residual)

    leaves = [t.clone().requires_grad_() for t in (n, *_matrices(mlp))]
    truth = _plain(leaves[0], mlp, weights, leaves[1:])
    gradients = torch.autograd.grad(truth, leaves, dy)
    assert relative(y, residual + truth) < TOLERANCE
    assert len(grads) == 2 * len(adapted.split())
    for mine, theirs in zip([dn, *grads], gradients, strict=True):
        assert relative(mine, theirs) < TOLERANCE


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [7, INNER])
def test_float32_is_as_close_as_the_plain_formula(width: int, activation: str) -> None:
    n, dy = randn(123, HIDDEN).float(), randn(123, HIDDEN, seed=1).float()
    mlp, _ = _mlp(8, "gate up down", 0.3, False, torch.bfloat16, torch.float32, activation)
    y, dn, grads = _ours(n, dy, mlp, width, torch.zeros_like(n))

    def plain(dtype: torch.dtype) -> list[Tensor]:
        wide, weights = _mlp(8, "gate up down", 0.3, False, torch.bfloat16, dtype, activation)
        leaves = [t.clone().to(dtype).requires_grad_() for t in (n, *_matrices(mlp))]
        out = _plain(leaves[0], wide, weights, leaves[1:])
        return [out.detach(), *torch.autograd.grad(out, leaves, dy.to(dtype))]

    both = zip([y, dn, *grads], plain(torch.float32), plain(torch.float64), strict=True)
    for mine, naive, truth in both:
        assert_noise_floor(mine, naive, truth, float(truth.abs().max()))


@pytest.mark.parametrize("width", [1, 7, INNER])
def test_geglu_matches_autograd(width: int) -> None:
    mlp, weights = _mlp(3, "gate up down", 0.3, True, activation="gelu_tanh")
    n, dy, residual = (randn(5, HIDDEN, seed=i) for i in range(3))
    y, dn, grads = _ours(n, dy, mlp, width, residual)
    leaves = [t.clone().requires_grad_() for t in (n, *_matrices(mlp))]
    truth = _plain(leaves[0], mlp, weights, leaves[1:])
    assert relative(y, residual + truth) < TOLERANCE
    for mine, theirs in zip([dn, *grads], torch.autograd.grad(truth, leaves, dy), strict=True):
        assert relative(mine, theirs) < TOLERANCE


def test_gates_of_ten_thousand_stay_finite() -> None:
    mlp, weights = _mlp(8, "gate up down", dtype=torch.float32, stored=torch.float32)
    n, dy = randn(5, HIDDEN).float() * 1e4, randn(5, HIDDEN, seed=1).float()
    y, dn, grads = _ours(n, dy, mlp, 7, torch.zeros_like(n))
    assert all(torch.isfinite(t).all() for t in (y, dn, *grads))
    assert relative(y, _plain(n, mlp, weights, _matrices(mlp))) < 1e-5
