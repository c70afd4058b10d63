"""Entropy and the most likely entry, taken on the way of the loss's sweep."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_noise_floor, frozen, randn

from lowtide.ops.cross_entropy import Distribution, LossBuffers, cross_entropy


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
def test_against_the_softmax(softcap: float, backward: bool, scale: float) -> None:
    tokens, hidden, vocab = 7, 11, 53
    n, head = randn(tokens, hidden) * scale, randn(vocab, hidden)
    labels = torch.arange(tokens) * 5
    found = {}
    for dtype in (torch.float64, torch.float32):
        distribution = Distribution(tokens, n.to(dtype))
        buffers = LossBuffers(
            torch.empty(5 * hidden, dtype=dtype), torch.empty(tokens * 10, dtype=dtype)
        )
        results = [
            cross_entropy(
                n.to(dtype), frozen(head.to(dtype), dtype), labels,
                label_rows=torch.empty(tokens, hidden, dtype=dtype),
                dn=torch.empty(tokens, hidden, dtype=dtype) if backward else None,
                buffers=buffers, softcap=softcap, distribution=of,
            )
            for of in (None, distribution)
        ]  # fmt: skip
        assert torch.equal(*results)  # the loss does not depend on it
        found[dtype] = distribution

    def plain(dtype: torch.dtype) -> torch.distributions.Categorical:
        logits = n.to(dtype) @ head.to(dtype).t()
        return torch.distributions.Categorical(
            logits=softcap * torch.tanh(logits / softcap) if softcap else logits
        )

    truth = plain(torch.float64)
    torch.testing.assert_close(
        found[torch.float64].entropy, truth.entropy(), rtol=1e-12, atol=1e-12
    )
    assert torch.equal(found[torch.float64].best, truth.logits.argmax(-1))
    largest = truth.logits.abs().amax(-1)
    assert_noise_floor(
        found[torch.float32].entropy, plain(torch.float32).entropy(), truth.entropy(), largest
    )
