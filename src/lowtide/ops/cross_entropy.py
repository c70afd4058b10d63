"""Cross-entropy against a frozen head as one attention sweep over the vocabulary.

    loss = sum_t logsumexp(n_t E^T) - n_t . E[label_t]      dn = softmax(n E^T) E - E[label]

The gradient of the head is not wanted, so dn is attention with keys = values = E: over tiles of E
keep a running maximum m, a running sum and a running sum of `exp(n E^T - m) E`, rescaled whenever m
rises (the online softmax of arXiv 1805.02867). E is read once and only one `(T, tile)` piece of the
logits exists at a time. Callers pass labelled positions only.

With a softcap c, logits are `c tanh(n E^T / c)`, and each term of dn is multiplied by
`1 - tanh(n E^T / c)^2`; that factor takes a second piece of the same size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .elementwise import exp_below_zero_
from .frozen import FrozenMatrix, spans
from .products import add_product_, product_


class LossBuffers(NamedTuple):
    """Reused buffers: a flat weight tile and a flat `T * rows` piece of the logits.

    With a softcap, half of the latter is for the derivative.
    """

    tile: Tensor
    logits: Tensor


def _tile_rows(n: Tensor, head: FrozenMatrix, buffers: LossBuffers, pieces: int) -> int:
    """Vocabulary rows per tile that both buffers can hold, `pieces` times in the logits'."""
    per_row = pieces * max(1, n.shape[0])
    return max(1, min(head.rows_per_tile(buffers.tile), buffers.logits.numel() // per_row))


def softcap_(logits: Tensor, cap: float, slope: Tensor | None = None) -> Tensor:
    """`cap tanh(logits / cap)` in place; its derivative `1 - tanh^2` into `slope`."""
    logits.div_(cap).tanh_()
    if slope is not None:
        torch.mul(logits, logits, out=slope).neg_().add_(1.0)
    return logits.mul_(cap)


def cross_entropy(
    n: Tensor,
    head: FrozenMatrix,
    labels: Tensor,
    *,
    label_rows: Tensor,
    dn: Tensor | None,
    buffers: LossBuffers,
    softcap: float = 0.0,
) -> Tensor:
    """Loss of every position and, with `dn`, the gradient of their sum.

    Args:
        n: `(T, H)`, hidden states of labelled positions after the final norm.
        head: `E (V, H)`.
        labels: `(T,)` int64.
        label_rows: `(T, H)`, overwritten with `E[labels]`, times its derivative where capped.
        dn: `(T, H)`, overwritten with the gradient of the summed loss, or None for the loss only.
        buffers: see `LossBuffers`.
        softcap: of the logits; 0 caps nothing.

    Returns:
        `(T,)` losses in nats.
    """
    tokens = n.shape[0]
    top = n.new_full((tokens, 1), float("-inf"))
    total = n.new_zeros(tokens, 1)
    if dn is not None:
        dn.zero_()
    pieces = 2 if softcap and dn is not None else 1
    for start, stop in spans(head.shape[0], _tile_rows(n, head, buffers, pieces)):
        rows = head.rows(start, stop, buffers.tile)
        size = tokens * (stop - start)
        logits = buffers.logits[:size].view(tokens, stop - start)
        product_(logits, n, rows.t())
        slope = buffers.logits[size : 2 * size].view_as(logits) if pieces == 2 else None
        if softcap:
            softcap_(logits, softcap, slope)
        new_top = torch.maximum(top, logits.amax(-1, keepdim=True))
        decay = exp_below_zero_(top.sub_(new_top))
        exp_below_zero_(logits.sub_(new_top))
        total.mul_(decay).add_(logits.sum(-1, keepdim=True))
        if dn is not None:
            weights = logits if slope is None else logits.mul_(slope)
            add_product_(dn.mul_(decay), weights, rows)
        top = new_top
    head.take(labels, label_rows)
    label_logits = torch.einsum("th,th->t", n, label_rows)
    if softcap:
        slope = torch.empty_like(label_logits)
        softcap_(label_logits, softcap, slope)
        label_rows.mul_(slope.unsqueeze(1))
    losses = top.squeeze(1).add_(total.squeeze(1).log()).sub_(label_logits)
    if dn is not None:
        dn.div_(total).sub_(label_rows)
    return losses
