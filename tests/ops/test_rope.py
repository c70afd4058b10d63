"""The rotary rotation and its transpose against explicit 2 x 2 rotation matrices."""

from __future__ import annotations

import pytest
import torch
from helpers import randn, relative
from torch import Tensor

from lowtide.ops.rope import rope_


def _tables(tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angles = randn(tokens, head_dim // 2, seed=9) * 3
    return angles.cos(), angles.sin()


def _rotation(cos: Tensor, sin: Tensor) -> Tensor:
    """`(T, head_dim, head_dim)` rotation matrices of the half-split layout."""
    half = cos.shape[1]
    matrix = torch.zeros(len(cos), 2 * half, 2 * half, dtype=cos.dtype)
    for i in range(half):
        matrix[:, i, i], matrix[:, i, half + i] = cos[:, i], -sin[:, i]
        matrix[:, half + i, half + i], matrix[:, half + i, i] = cos[:, i], sin[:, i]
    return matrix


@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 1, 2), (5, 5, 6), (123, 3, 22)])
@pytest.mark.parametrize("inverse", [False, True])
def test_is_a_rotation_or_its_transpose(
    tokens: int, heads: int, head_dim: int, inverse: bool
) -> None:
    cos, sin = _tables(tokens, head_dim)
    x = randn(tokens, heads * head_dim)
    ours = x.clone()
    rope_(ours, cos, sin, torch.full((ours.numel() // 2,), torch.nan).double(), inverse)
    matrix = _rotation(cos, sin)
    if inverse:
        matrix = matrix.transpose(1, 2)
    truth = torch.einsum("tij,thj->thi", matrix, x.view(tokens, heads, head_dim))
    assert relative(ours, truth.reshape_as(x)) < 1e-14  # two products and a sum


@pytest.mark.parametrize("inverse", [False, True])
def test_the_rest_of_a_head_stays_and_a_factor_is_carried(inverse: bool) -> None:
    """Tables of 6 of 10 columns, 1.5 times a rotation: the transpose is 1.5 times too."""
    cos, sin = _tables(5, 6)
    x = randn(5, 30)
    ours = x.clone()
    scratch = torch.full((5 * 3 * 3,), torch.nan).double()
    rope_(ours, 1.5 * cos, 1.5 * sin, scratch, inverse, head_dim=10)
    matrix = 1.5 * _rotation(cos, sin)
    if inverse:
        matrix = matrix.transpose(1, 2)
    truth = x.view(5, 3, 10).clone()
    truth[:, :, :6] = torch.einsum("tij,thj->thi", matrix, truth[:, :, :6])
    assert relative(ours, truth.reshape_as(x)) < 1e-14
    assert ours.view(5, 3, 10)[:, :, 6:].equal(x.view(5, 3, 10)[:, :, 6:])


def test_inverse_undoes_the_forward() -> None:
    cos, sin = _tables(7, 10)
    x = randn(7, 30)
    there_and_back = x.clone()
    scratch = torch.empty(x.numel(), dtype=x.dtype)
    rope_(there_and_back, cos, sin, scratch)
    assert relative(there_and_back, x) > 0.1
    rope_(there_and_back, cos, sin, scratch, inverse=True)
    assert relative(there_and_back, x) < 1e-14
