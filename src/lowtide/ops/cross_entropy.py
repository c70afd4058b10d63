"""Cross-entropy against a frozen head as one attention sweep over the vocabulary.

    loss = sum_t logsumexp(n_t E^T) - n_t . E[label_t]      dn = softmax(n E^T) E - E[label]

The gradient of the head is not wanted, so dn is attention with keys = values = E: over tiles of E
keep a running maximum m, a running sum and a running sum of `exp(n E^T - m) E`, rescaled whenever m
rises (the online softmax of arXiv 1805.02867). E is read once and only one `(T, tile)` piece of the
logits exists at a time. Callers pass labelled positions only.

A `Distribution` takes the entropy and the most likely entry of each position on the way, for one
more elementwise pass.

With a softcap c, logits are `c tanh(n E^T / c)`, and each term of dn is multiplied by
`1 - tanh(n E^T / c)^2`; that factor takes a second piece of the same size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dropout import row_spans
from .elementwise import exp_below_zero_, floor_below_zero
from .frozen import FrozenMatrix, spans
from .products import add_product_, product_


class LossBuffers(NamedTuple):
    """Reused buffers: a flat weight tile and a flat `T * rows` piece of the logits.

    With a softcap, half of the latter is for the derivative.
    """

    tile: Tensor
    logits: Tensor


class Distribution:
    """Entropy and most likely entry of each position, summed up over the tiles of a sweep.

        entropy = log sum_v e_v - (sum_v e_v x_v) / sum_v e_v    x_v = logit_v - max, e_v = exp x_v

    Attributes:
        entropy: `(T,)` nats, once the sweep is over.
        best: `(T,)` int64, the place of the largest logit.
    """

    def __init__(self, tokens: int, like: Tensor) -> None:
        """For T positions whose hidden states are of the dtype and on the device of `like`."""
        self.entropy = like.new_zeros(tokens)
        self.best = torch.zeros(tokens, dtype=torch.int64, device=like.device)

    def find_best(self, logits: Tensor, start: int, top: Tensor) -> None:
        """Take the logits `(T, n)` of entries from `start` on; `top (T, 1)` was the largest."""
        tops, places = logits.max(-1, keepdim=True)
        higher = (tops > top).squeeze(1)
        self.best = torch.where(higher, places.squeeze(1) + start, self.best)

    def exp_(self, x: Tensor, drop: Tensor, total: Tensor) -> None:
        """Turn x `(T, n)` into e in place; summed are now `sum e x`.

        Args:
            x: logits less the maximum so far.
            drop: `(T, 1)`, by how much that maximum has risen, negative.
            total: `(T, 1)`, the sum of e before this tile, relative to the maximum before.
        """
        drop = drop.clamp(min=floor_below_zero(drop.dtype))
        self.entropy.add_((total * drop).squeeze(1)).mul_(drop.exp().squeeze(1))
        for start, stop in row_spans(*x.shape):
            rows = x[start:stop]
            before = rows.clone()
            self.entropy[start:stop] += torch.einsum("tv,tv->t", exp_below_zero_(rows), before)

    def finish(self, total: Tensor) -> None:
        """The sweep is over; `total (T, 1)` is the sum of e."""
        self.entropy.div_(total.squeeze(1)).neg_().add_(total.squeeze(1).log())


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
    distribution: Distribution | None = None,
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
        distribution: of these positions, filled; None spares its pass.

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
        if distribution is not None:
            distribution.find_best(logits, start, top)
        new_top = torch.maximum(top, logits.amax(-1, keepdim=True))
        drop = top.sub_(new_top)
        if distribution is None:
            exp_below_zero_(logits.sub_(new_top))
        else:
            distribution.exp_(logits.sub_(new_top), drop, total)
        decay = exp_below_zero_(drop)
        total.mul_(decay).add_(logits.sum(-1, keepdim=True))
        if dn is not None:
            weights = logits if slope is None else logits.mul_(slope)
            add_product_(dn.mul_(decay), weights, rows)
        top = new_top
    if distribution is not None:
        distribution.finish(total)
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
