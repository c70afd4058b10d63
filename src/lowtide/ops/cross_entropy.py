"""Cross-entropy against a frozen head as one attention sweep over the vocabulary.

    loss = sum_t logsumexp(n_t E^T) - n_t . E[label_t]      dn = softmax(n E^T) E - E[label]

The gradient of the head is not wanted, so dn is attention with keys = values = E: over tiles of E
keep a running maximum m, a running sum and a running sum of `exp(n E^T - m) E`, rescaled whenever m
rises (the online softmax of arXiv 1805.02867). E is read once and only one `(T, tile)` piece of the
logits exists at a time. Callers pass labelled positions only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .elementwise import exp_below_zero_
from .frozen import FrozenMatrix, spans


class LossBuffers(NamedTuple):
    """Reused buffers: a flat weight tile and a flat `T * rows` piece of the logits."""

    tile: Tensor
    logits: Tensor


def _tile_rows(n: Tensor, head: FrozenMatrix, buffers: LossBuffers) -> int:
    """Vocabulary rows per tile that both buffers can hold."""
    return max(
        1, min(head.rows_per_tile(buffers.tile), buffers.logits.numel() // max(1, n.shape[0]))
    )


def cross_entropy(
    n: Tensor,
    head: FrozenMatrix,
    labels: Tensor,
    *,
    label_rows: Tensor,
    dn: Tensor | None,
    buffers: LossBuffers,
) -> Tensor:
    """Loss of every position and, with `dn`, the gradient of their sum.

    Args:
        n: `(T, H)`, hidden states of labelled positions after the final norm.
        head: `E (V, H)`.
        labels: `(T,)` int64.
        label_rows: `(T, H)`, overwritten with `E[labels]`.
        dn: `(T, H)`, overwritten with the gradient of the summed loss, or None for the loss only.
        buffers: see `LossBuffers`.

    Returns:
        `(T,)` losses in nats.
    """
    tokens = n.shape[0]
    top = n.new_full((tokens, 1), float("-inf"))
    total = n.new_zeros(tokens, 1)
    if dn is not None:
        dn.zero_()
    for start, stop in spans(head.shape[0], _tile_rows(n, head, buffers)):
        rows = head.rows(start, stop, buffers.tile)
        logits = buffers.logits[: tokens * (stop - start)].view(tokens, stop - start)
        torch.mm(n, rows.t(), out=logits)
        new_top = torch.maximum(top, logits.amax(-1, keepdim=True))
        decay = exp_below_zero_(top.sub_(new_top))
        exp_below_zero_(logits.sub_(new_top))
        total.mul_(decay).add_(logits.sum(-1, keepdim=True))
        if dn is not None:
            dn.mul_(decay).addmm_(logits, rows)
        top = new_top
    head.take(labels, label_rows)
    label_logits = torch.einsum("th,th->t", n, label_rows)
    losses = top.squeeze(1).add_(total.squeeze(1).log()).sub_(label_logits)
    if dn is not None:
        dn.div_(total).sub_(label_rows)
    return losses
