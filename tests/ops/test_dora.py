"""DoRA in a linear and in the tiled MLP against autograd on the plain formula; its row norms."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_noise_floor, frozen, randn, relative
from torch import Tensor

from lowtide.ops.dora import Magnitude, column_dots, row_norms
from lowtide.ops.dropout import dropout_scale
from lowtide.ops.glu import Columns, Glu, GluBuffers, glu_backward, glu_forward
from lowtide.ops.lora_linear import Linear, Lora, linear_backward, linear_forward
from lowtide.weights.matrix import MappedMatrix

TOLERANCE = 1e-12  # float64 sums of a few hundred terms round at 1e-14
TOKENS, INNER, OUTER = 5, 37, 74
NAMES = ("gate", "up", "down")


def _linear(
    shape: tuple[int, int],
    rank: int,
    dropout: float,
    *,
    seed: int = 0,
    bias: bool = True,
    adapted: str = "DoRA",
    stored: torch.dtype = torch.float64,
    dtype: torch.dtype = torch.float64,
) -> Linear:
    """A linear whose magnitudes are not its norms, one of them zero."""
    outer, inner = shape
    weight = frozen((randn(outer, inner, seed=seed) * inner**-0.5).to(stored), dtype)
    offset = randn(outer, seed=seed + 4, dtype=dtype) if bias else None
    if not adapted:
        return Linear(weight, offset, None)
    a = randn(rank, inner, seed=seed + 2, dtype=dtype) * inner**-0.5
    b = randn(outer, rank, seed=seed + 3, dtype=dtype)
    lora = Lora(a, b, 2.0 / rank, dropout, seed=777 + seed)
    if adapted == "DoRA":
        m = randn(outer, seed=seed + 5, dtype=dtype)
        m[outer // 2] = 0.0
        lora = lora._replace(magnitude=Magnitude(m, row_norms(weight, a, b, lora.scale)))
    return Linear(weight, offset, lora)


def _leaves(linears: Sequence[Linear], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """A, B and m of each adapted linear, in order."""
    parts = []
    for linear in linears:
        if linear.lora is not None:
            parts += [linear.lora.a, linear.lora.b]
        if linear.magnitude is not None:
            parts.append(linear.magnitude.m)
    return [part.to(dtype).clone().requires_grad_() for part in parts]


def _plain(x: Tensor, linear: Linear, leaves: list[Tensor]) -> Tensor:
    """The formula on whole matrices, as PEFT defines it; takes its leaves from the front."""
    assert isinstance(linear.weight, MappedMatrix)
    weight = linear.weight.whole().to(x.dtype)
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    y = F.linear(x, weight, bias)
    lora = linear.lora
    if lora is None:
        return y
    a, b = leaves.pop(0), leaves.pop(0)
    dropped = x * dropout_scale(x.detach(), lora.dropout, lora.seed)
    lora_y = lora.scale * F.linear(F.linear(dropped, a), b)
    if linear.magnitude is None:
        return y + lora_y
    norm = torch.linalg.norm(weight + lora.scale * b @ a, dim=1).detach()
    factor = leaves.pop(0) / norm
    return y + (factor - 1) * F.linear(dropped, weight) + factor * lora_y


def _ours(x: Tensor, dy: Tensor, linear: Linear, tile_rows: int, dx: Tensor) -> list[Tensor]:
    """y, dx, dA, dB, dm; buffers start as NaN, inputs must stay as they were."""
    tile = torch.full((tile_rows * x.shape[1],), torch.nan, dtype=x.dtype)
    y = torch.full(dy.shape, torch.nan, dtype=x.dtype)
    before, dx = (x.clone(), dy.clone()), dx.clone()
    linear_forward(x, linear, y, tile)
    emitted: list[Tensor] = []
    linear_backward(dy, x, linear, dx, tile, emit=lambda *grads: emitted.extend(grads))
    assert x.equal(before[0])
    assert dy.equal(before[1])
    without: list[Tensor] = []
    linear_backward(dy, x, linear, None, tile, emit=lambda *grads: without.extend(grads))
    assert all(one.equal(other) for one, other in zip(emitted, without, strict=True))
    return [y, dx, *emitted]


@pytest.mark.parametrize("tile_rows", [1, 3, 50, OUTER])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16])
def test_a_linear_matches_autograd(
    stored: torch.dtype, rank: int, dropout: float, tile_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowtide.ops.lora_linear.DORA_ROWS", 31)
    linear = _linear((OUTER, INNER), rank, dropout, bias=rank != 8, stored=stored)
    x, dy, start = randn(TOKENS, INNER), randn(TOKENS, OUTER, seed=5), randn(TOKENS, INNER, seed=7)
    ours = _ours(x, dy, linear, tile_rows, start)
    point, leaves = x.clone().requires_grad_(), _leaves([linear])
    y = _plain(point, linear, list(leaves))
    dx, *grads = torch.autograd.grad(y, [point, *leaves], dy)
    for mine, truth in zip(ours, (y.detach(), start + dx, *grads), strict=True):
        assert relative(mine, truth) < TOLERANCE


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", [1, 64])
def test_a_linear_in_float32_is_as_close_as_the_plain_formula(rank: int, dropout: float) -> None:
    given = {"stored": torch.float32, "dtype": torch.float32}
    linear = _linear((OUTER, INNER), rank, dropout, **given)  # type: ignore[arg-type]
    x, dy = randn(123, INNER).float(), randn(123, OUTER, seed=5).float()
    ours = _ours(x, dy, linear, 11, torch.zeros_like(x))

    def plain(dtype: torch.dtype) -> list[Tensor]:
        point, leaves = x.to(dtype).requires_grad_(), _leaves([linear], dtype)
        y = _plain(point, linear, list(leaves))
        return [y.detach(), *torch.autograd.grad(y, [point, *leaves], dy.to(dtype))]

    for mine, naive, truth in zip(ours, plain(torch.float32), plain(torch.float64), strict=True):
        assert_noise_floor(mine, naive, truth, float(truth.abs().max()))


@pytest.mark.parametrize("width", [1, 7, 50, OUTER])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("adapted", "activation"),
    [
        (("DoRA", "DoRA", "DoRA"), "silu"),
        (("DoRA", "DoRA", "DoRA"), "gelu_tanh"),
        (("DoRA", "", ""), "silu"),
        (("", "DoRA", ""), "silu"),
        (("", "", "DoRA"), "silu"),
        (("LoRA", "DoRA", "LoRA"), "silu"),
        (("DoRA", "LoRA", "DoRA"), "silu"),
    ],
    ids=str,
)
def test_the_mlp_matches_autograd_at_every_width(
    adapted: tuple[str, str, str], activation: str, kept: bool, dropout: float, width: int
) -> None:
    """The intermediate size is OUTER, the hidden one INNER."""
    shapes = {"gate": (OUTER, INNER), "up": (OUTER, INNER), "down": (INNER, OUTER)}
    linears = [
        _linear(shapes[name], 3, dropout, seed=10 * i, adapted=adapted[i], bias=i != 1)
        for i, name in enumerate(NAMES)
    ]
    mlp = Glu(*linears, activation)
    n, dy = randn(TOKENS, INNER), randn(TOKENS, INNER, seed=1)
    nans = torch.full((4, width * max(INNER, TOKENS)), torch.nan, dtype=n.dtype)
    buffers = GluBuffers(
        tiles=[nans[0, : width * INNER].clone() for _ in range(2)],
        activations=[row[: width * TOKENS] for row in nans.unbind()],
        width=width,
    )
    columns = Columns(*(torch.full((TOKENS, OUTER), torch.nan, dtype=n.dtype) for _ in "gu"))
    y = torch.zeros_like(n)
    glu_forward(n, mlp, y, buffers, columns if kept else None)
    dn, grads = torch.full_like(n, torch.nan), dict[str, list[Tensor]]()
    emits = [lambda *found, name=name: grads.setdefault(name, []).extend(found) for name in NAMES]
    glu_backward(dy, n, mlp, dn, buffers, emits=emits, kept=columns if kept else None)

    point, leaves = n.clone().requires_grad_(), _leaves(linears)
    left = list(leaves)
    gate, up = (_plain(point, linear, left) for linear in linears[:2])
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    truth = _plain(act * up, linears[2], left)
    expected = torch.autograd.grad(truth, [point, *leaves], dy)
    ours = [dn, *(grad for name in NAMES for grad in grads.get(name, []))]
    assert relative(y, truth) < TOLERANCE
    for mine, theirs in zip(ours, expected, strict=True):
        assert relative(mine, theirs) < TOLERANCE


def _kappa(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """How far the terms of a row are longer than their sum, `(out,)`."""
    terms = weight.norm(dim=1) + scale * b.abs() @ a.norm(dim=1)
    return terms / torch.linalg.norm(weight + scale * b @ a, dim=1)


@pytest.mark.parametrize("cancelled", [0.0, 0.9, 0.999, 0.99999])
def test_norms_keep_their_bound_where_the_adapter_cancels_the_weight(cancelled: float) -> None:
    """`eps ((r + 2) kappa + in)`, whose share of kappa is where the expansion has its square."""
    inner, outer, rank, scale = 301, 97, 5, 2.0
    a = randn(rank, inner).float()
    b = randn(outer, rank, seed=1).float()
    # W = -cancelled s B A + a small rest, in float32 numbers.
    rest = randn(outer, inner, seed=2).float() * (1.0 if not cancelled else 1.0 - cancelled)
    weight = rest - cancelled * scale * (b @ a)
    truth = torch.linalg.norm(weight.double() + scale * b.double() @ a.double(), dim=1)
    kappa = _kappa(weight.double(), a.double(), b.double(), scale)
    ours = row_norms(frozen(weight, torch.float32), a, b, scale)
    eps = torch.finfo(torch.float32).eps
    error = ((ours.double() - truth) / truth).abs()
    assert bool((error <= eps * ((rank + 2) * kappa + inner)).all())
    expanded = (
        weight.square().sum(1)
        + 2 * scale * (b * (weight @ a.t())).sum(1)
        + scale**2 * ((b @ (a @ a.t())) * b).sum(1)
    )
    if cancelled == 0.999:
        squared = ((expanded.double() - truth.square()) / truth.square()).abs()
        assert float(squared.median()) > 100 * float(error.median())


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (301, 7), (7, 100_001)])
def test_norms_are_formed_in_pieces(shape: tuple[int, int]) -> None:
    weight, a, b = randn(*shape), randn(2, shape[1], seed=1), randn(shape[0], 2, seed=2)
    ours = row_norms(frozen(weight), a, b, 0.5)
    assert relative(ours, torch.linalg.norm(weight + 0.5 * b @ a, dim=1)) < TOLERANCE


def test_dots_of_columns() -> None:
    x, y = randn(1003, 77), randn(1003, 77, seed=1)
    assert relative(column_dots(x, y), (x * y).sum(0)) < TOLERANCE
