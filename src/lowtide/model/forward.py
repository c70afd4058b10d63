"""The structured pass over a whole model: embedding, blocks, final norm, loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise, repeat

import torch
from torch import Tensor

from lowtide.ops.cross_entropy import Distribution, cross_entropy, softcap_
from lowtide.ops.frozen import matmul_
from lowtide.ops.rmsnorm import rmsnorm_backward_, rmsnorm_forward

from .batch import Batch
from .block import Block, Kept, Positions, block_forward
from .decoder import Decoder
from .neftune import Noise
from .workspace import Workspace


def blocks_forward(
    blocks: Iterable[Block],
    inputs: Sequence[Tensor],
    at: Positions,
    ws: Workspace,
    keeps: Iterable[Kept | None] = repeat(None),
) -> Tensor:
    """Run every block from `inputs[0]`, which holds the embeddings.

    Args:
        blocks: the model's, in order, with their adapters.
        inputs: one `(T, H)` per block and one more for the last one's output. Tensors may repeat
            where an input need not be kept, but neighbours must not overlap.
        at: segments and rotary tables.
        ws: buffers.
        keeps: for each block, what takes its intermediates, or None.

    Returns:
        The last block's output, the last of `inputs`.
    """
    each = iter(blocks)
    for (x, out), keep in zip(pairwise(inputs), keeps, strict=False):
        # A block lives for this call only: mezo's hold moved copies of the adapter.
        block_forward(x, next(each), at, ws, out=out, keep=keep)
    return inputs[-1]


def loss_forward(
    model: Decoder,
    x: Tensor,
    batch: Batch,
    ws: Workspace,
    distribution: Distribution | None = None,
) -> Tensor:
    """Losses of the labelled positions, without a gradient.

    Args:
        model: for the final norm and the head.
        x: `(T, H)`, the last block's output.
        batch: for the labels.
        ws: buffers.
        distribution: of the labelled positions, filled; None spares it.

    Returns:
        `(n_tokens,)` losses in nats.
    """
    _, n, label_rows, labels, _ = _labelled(model, x, batch, ws)
    return cross_entropy(
        n, model.head, labels, label_rows=label_rows, dn=None, buffers=ws.loss,
        softcap=model.spec.logit_softcap, distribution=distribution,
    )  # fmt: skip


def loss_backward_(
    model: Decoder,
    x: Tensor,
    batch: Batch,
    ws: Workspace,
    *,
    scale: float,
    distribution: Distribution | None = None,
) -> Tensor:
    """Losses, and `x` turned into the gradient of `scale * sum(losses)`, in place.

    Args:
        model: for the final norm and the head.
        x: `(T, H)`, the last block's output; overwritten with its gradient.
        batch: for the labels.
        ws: buffers.
        scale: usually 1 / labelled tokens of the whole update.
        distribution: of the labelled positions, filled; None spares it.

    Returns:
        `(n_tokens,)` losses in nats.
    """
    chosen, n, label_rows, labels, rstd = _labelled(model, x, batch, ws)
    dn = ws.wide(4, *n.shape)
    losses = cross_entropy(
        n, model.head, labels, label_rows=label_rows, dn=dn, buffers=ws.loss,
        softcap=model.spec.logit_softcap, distribution=distribution,
    )  # fmt: skip
    dx = ws.wide(3, *n.shape).zero_()
    dn.mul_(scale * model.spec.logit_scale)
    rmsnorm_backward_(dx, dn, chosen, model.final_norm, rstd, scratch=n)
    x.zero_().index_copy_(0, batch.labelled, dx)
    return losses


def _labelled(
    model: Decoder, x: Tensor, batch: Batch, ws: Workspace
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Labelled rows of x, their scaled norm, a buffer for E[labels], the labels, and rstd."""
    places = batch.labelled
    count, hidden = len(places), x.shape[1]
    chosen = torch.index_select(x, 0, places, out=ws.wide(1, count, hidden))
    n = ws.wide(0, count, hidden)
    rstd = rmsnorm_forward(chosen, model.final_norm, model.spec.rms_norm_eps, out=n)
    _scale_(n, model.spec.logit_scale)
    return chosen, n, ws.wide(2, count, hidden), batch.targets[places], rstd


def _scale_(x: Tensor, factor: float) -> None:
    """`x *= factor`, rounded to the dtype of x; costs nothing where it is 1."""
    if factor != 1.0:
        x.mul_(factor)


def embed(model: Decoder, ids: Tensor, out: Tensor) -> None:
    """`out (T, H) = E[ids]` in the compute dtype, scaled."""
    model.embedding.take(ids, out)
    _scale_(out, model.spec.embedding_scale)


def embed_batch(model: Decoder, batch: Batch, out: Tensor, noise: Noise | None) -> None:
    """`embed` the batch's tokens, with this micro-batch's noise on them if there is any."""
    embed(model, batch.ids, out)
    if noise is not None:
        noise.add_(out, batch.lengths, model.spec)


def head_logits(model: Decoder, x: Tensor, ws: Workspace) -> Tensor:
    """Full logits `(T, V)` of the last block's output `x (T, H)`: for generation and tests."""
    n = ws.wide(0, *x.shape)
    rmsnorm_forward(x, model.final_norm, model.spec.rms_norm_eps, out=n)
    _scale_(n, model.spec.logit_scale)
    out = x.new_empty(x.shape[0], model.spec.vocab_size)
    matmul_(out, n, model.head, ws.linear_tile)
    cap = model.spec.logit_softcap
    return softcap_(out, cap) if cap else out


def workspace_for(
    model: Decoder, max_tokens: int, max_length: int, tiles: str = "full"
) -> Workspace:
    """Buffers for batches of that many tokens and that longest sequence."""
    return Workspace(model.spec, max_tokens, max_length, model.compute_dtype, tiles)
