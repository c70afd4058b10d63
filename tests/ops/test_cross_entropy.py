"""The loss as one sweep over vocabulary tiles against cross-entropy on whole logits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import EPS32, assert_noise_floor, frozen, randn, relative
from torch import Tensor

from lowtide.ops.cross_entropy import LossBuffers, cross_entropy

TOLERANCE = 1e-12  # float64 sums of a few hundred terms round at 1e-14
VOCAB, HIDDEN = 131, 37


def _labels(tokens: int) -> Tensor:
    """Some labels, among them the first and the last of the vocabulary."""
    labels = torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(3))
    labels[0] = VOCAB - 1
    labels[-1] = 0 if tokens > 1 else VOCAB - 1
    return labels


def _ours(
    n: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    tile: int,
    logits: int,
    gradient: bool = True,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Losses and dn with room for `tile` head rows and `logits` columns; buffers start as NaN."""
    before = n.clone()
    buffers = LossBuffers(
        tile=torch.full((tile * n.shape[1],), torch.nan, dtype=n.dtype),
        logits=torch.full((logits * len(n),), torch.nan, dtype=n.dtype),
    )
    dn = torch.full_like(n, torch.nan) if gradient else None
    rows = torch.full_like(n, torch.nan)
    losses = cross_entropy(
        n, frozen(head, n.dtype), labels,
        label_rows=rows, dn=dn, buffers=buffers, softcap=softcap,
    )  # fmt: skip
    assert n.equal(before)
    return losses, dn


def _plain(n: Tensor, head: Tensor, labels: Tensor, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    leaf = n.clone().requires_grad_()
    logits = leaf @ head.to(n.dtype).t()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.mark.parametrize(("tile", "logits"), [(1, 200), (200, 1), (7, 9), (50, 50), (200, 200)])
@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 123])
def test_matches_autograd_in_float64_at_every_tiling(
    tokens: int, stored: torch.dtype, tile: int, logits: int
) -> None:
    n, head, labels = randn(tokens, HIDDEN), randn(VOCAB, HIDDEN).to(stored), _labels(tokens)
    losses, dn = _ours(n, head, labels, tile=tile, logits=logits)
    truth, gradient = _plain(n, head, labels)
    assert dn is not None
    assert relative(losses, truth) < TOLERANCE
    assert relative(dn, gradient) < TOLERANCE
    only, none = _ours(n, head, labels, tile=tile, logits=logits, gradient=False)
    assert none is None
    assert only.equal(losses)


@pytest.mark.parametrize(("tile", "logits"), [(1, 200), (200, 2), (7, 9), (200, 400)])
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_a_softcap_matches_autograd_in_float64(softcap: float, tile: int, logits: int) -> None:
    n, head, labels = randn(23, HIDDEN), randn(VOCAB, HIDDEN), _labels(23)
    losses, dn = _ours(n, head, labels, tile=tile, logits=logits, softcap=softcap)
    truth, gradient = _plain(n, head, labels, softcap)
    assert dn is not None
    assert relative(losses, truth) < TOLERANCE
    assert relative(dn, gradient) < TOLERANCE
    only, _ = _ours(n, head, labels, tile=tile, logits=logits, gradient=False, softcap=softcap)
    assert relative(only, truth) < TOLERANCE
    assert relative(_plain(n, head, labels)[0], truth) > 1e-3


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("tile", [7, 200])
@pytest.mark.parametrize("size", [0.01, 1.0, 10.0])
def test_float32_is_as_close_as_the_plain_formula(size: float, tile: int, softcap: float) -> None:
    n, head, labels = randn(123, HIDDEN).float() * size, randn(VOCAB, HIDDEN).float(), _labels(123)
    losses, dn = _ours(n, head, labels, tile=tile, logits=2 * tile, softcap=softcap)
    assert dn is not None
    naive, naive_dn = _plain(n, head, labels, softcap)
    truth, truth_dn = _plain(n.double(), head.double(), labels, softcap)
    # A loss is a logarithm of a sum, at most log V above the largest logit, less a logit; dn is a
    # difference of rows of the head whose weights carry the logits' rounding.
    largest = float((n @ head.t()).abs().max())
    assert_noise_floor(losses, naive, truth, largest + math.log(VOCAB))
    assert_noise_floor(dn, naive_dn, truth_dn, max(1.0, largest) * float(head.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tile", [1, 7, 200])
def test_logits_of_ten_thousand_stay_finite_and_right(tile: int, dtype: torch.dtype) -> None:
    n, head, labels = randn(5, HIDDEN).to(dtype), randn(VOCAB, HIDDEN).to(dtype), _labels(5)
    n = n * (1e4 / float((n @ head.t()).abs().max()))
    losses, dn = _ours(n, head, labels, tile=tile, logits=tile)
    truth, gradient = _plain(n.double(), head.double(), labels)
    assert dn is not None
    assert torch.isfinite(losses).all()
    # Logits of 1e4 round by 1e4 eps, and so relatively do their exponentials.
    assert relative(losses, truth) < (1e-12 if dtype is torch.float64 else 8 * EPS32)
    assert relative(dn, gradient) < (1e-10 if dtype is torch.float64 else 1e4 * 8 * EPS32)


def test_the_right_answer_with_certainty_has_no_gradient() -> None:
    head = torch.eye(VOCAB, HIDDEN)
    n = torch.zeros(2, HIDDEN)
    n[0, 4], n[1, 30] = 1e4, 1e4
    losses, dn = _ours(n, head, torch.tensor([4, 30]), tile=7, logits=7)
    assert dn is not None
    assert losses.eq(0).all()
    # Exponentials are kept above the subnormal range: e^-80 in place of 0, for each of V words.
    assert float(dn.abs().max()) < VOCAB * 1e-34
