"""The structured step that mesp and lcsb share: a forward that keeps some block inputs, the loss,
and the hand-derived backward of the blocks whose input was kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from lowtide.model.adapter import MAGNITUDE, MATRICES, Adapter, parameter_name
from lowtide.model.batch import Batch
from lowtide.model.block import Block, block_backward
from lowtide.model.decoder import Decoder
from lowtide.model.forward import blocks_forward, embed_batch, loss_backward_, loss_forward
from lowtide.model.kept import KeptBlocks
from lowtide.model.neftune import Noise
from lowtide.model.row_norms import RowNorms
from lowtide.model.stored_h import StoredH

from .base import GradSink, Step, require_finite
from .buffers import Buffers


def kept_inputs(layers: Collection[int]) -> list[int]:
    """Of the blocks to go back through, those whose input is kept: the first embeds again."""
    return sorted(layer for layer in layers if layer > 0)


def places(rows: Sequence[Tensor], num_layers: int, kept: Sequence[int]) -> list[Tensor]:
    """Where each block reads its input, and where the last one writes.

    Args:
        rows: `2 + number kept` of `(T, H)`: the first two are for inputs that nobody needs later.
        num_layers: blocks of the model.
        kept: blocks whose input survives the forward, in order.

    Returns:
        `num_layers + 1` tensors `(T, H)`; neighbours never overlap.
    """
    own = {layer: 2 + number for number, layer in enumerate(kept)}
    chosen: list[int] = []
    for layer in range(num_layers + 1):
        passing = 1 if chosen and chosen[-1] == 0 else 0
        chosen.append(own.get(layer, passing))
    return [rows[row] for row in chosen]


def structured_step(
    model: Decoder,
    adapter: Adapter,
    batch: Batch,
    sink: GradSink,
    step: Step,
    *,
    buffers: Buffers,
    layers: Collection[int],
    stored_h: StoredH | None = None,
    kept_blocks: KeptBlocks | None = None,
) -> float:
    """Gradients of the adapters in `layers`; the residual path carries the signal past the others.

    Args:
        model: the frozen model.
        adapter: LoRA matrices.
        batch: sequences and labels.
        sink: takes each gradient as it comes.
        step: scale and dropout seed.
        buffers: reused between steps.
        layers: blocks to go back through; for the exact gradient, those from the lowest adapted one
            up.
        stored_h: keeps h of every adapted linear from the forward; None recomputes it.
        kept_blocks: takes the intermediates of some blocks; None recomputes all.

    Returns:
        The sum of the labelled positions' losses, in nats.

    Raises:
        TrainingError: the loss is not finite; no gradient has reached the sink.
    """

    def block_of(layer: int, *, backward: bool) -> Block:
        own = adapter if stored_h is None else stored_h.on(adapter, ready=backward)
        return model.block(layer, own, step.dropout_seed, norms)

    num_layers = model.spec.num_layers
    kept = kept_inputs(layers)
    ws, all_rows = buffers.for_batch(model, batch, 2 + len(kept))
    norms = RowNorms(adapter, ws.tile)  # the adapter is the same in the backward
    rows = all_rows.unbind()
    inputs = places(rows, num_layers, kept)
    at = model.positions(batch.lengths)
    embed_batch(model, batch, inputs[0], step.noise)
    forward = (block_of(layer, backward=False) for layer in range(num_layers))
    if kept_blocks is not None:
        kept_blocks.start(sum(batch.lengths))
    keeps = [None if kept_blocks is None else kept_blocks.of(i) for i in range(num_layers)]
    x = blocks_forward(forward, inputs, at, ws, keeps)
    total = require_finite(loss_backward_(model, x, batch, ws, scale=step.scale))
    for layer in sorted(layers, reverse=True):

        def emit(linear: str, *grads: Tensor, layer: int = layer) -> None:
            for part, grad in zip((*MATRICES, MAGNITUDE), grads, strict=False):
                sink.add(parameter_name(layer, linear, part), grad)

        if layer == 0:
            # Every kept input has been used by now, so the embeddings take the place of one.
            inputs[0] = rows[-1] if kept else rows[1] if inputs[-1] is rows[0] else rows[0]
            embed_batch(model, batch, inputs[0], step.noise)
        below = layer > min(layers)
        block = block_of(layer, backward=True)
        block_backward(
            x, inputs[layer], block, at, ws, emit=emit, input_gradient=below, kept=keeps[layer]
        )
    return total


def structured_losses(
    model: Decoder,
    adapter: Adapter | None,
    batch: Batch,
    buffers: Buffers,
    dropout_seed: int | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Losses `(n_tokens,)` of the labelled positions by a forward that keeps nothing.

    Args:
        model: the frozen model.
        adapter: LoRA matrices, or None.
        batch: sequences and labels.
        buffers: reused between steps.
        dropout_seed: of LoRA dropout; None for none.
        noise: on the embeddings; None for none.

    Returns:
        Losses in nats.
    """
    ws, rows = buffers.for_batch(model, batch, 2)
    inputs = places(rows.unbind(), model.spec.num_layers, ())
    embed_batch(model, batch, inputs[0], noise)
    norms = RowNorms(adapter, ws.tile)
    blocks = (model.block(i, adapter, dropout_seed, norms) for i in range(model.spec.num_layers))
    x = blocks_forward(blocks, inputs, model.positions(batch.lengths), ws)
    return loss_forward(model, x, batch, ws)
