"""MeSP: structured backpropagation (arXiv 2602.13069). Exact.

The forward keeps each block's input and nothing else. The backward walks the blocks in reverse: it
recomputes what a block's backward needs, h = x A^T included, uses it and frees it. No autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowtide.model.adapter import Adapter, parameter_name
from lowtide.model.batch import Batch
from lowtide.model.block import block_backward
from lowtide.model.decoder import Decoder
from lowtide.model.forward import blocks_forward, embed, loss_backward_, loss_forward, workspace_for
from lowtide.model.workspace import Workspace

from .base import GradSink, Step, require_finite


class Mesp:
    """Keeps its buffers between steps and grows them when a larger batch comes."""

    name = "mesp"
    exact = True

    def __init__(self) -> None:
        """No buffer is made before `reserve` or the first batch."""
        self._max_tokens = self._max_length = 0
        self._ws: Workspace | None = None
        self._inputs: Tensor | None = None
        self._for: Decoder | None = None

    def reserve(self, model: Decoder, max_tokens: int, max_length: int) -> None:
        """See `Method.reserve`. What a smaller batch does not touch costs no memory."""
        self._buffers(model, max_tokens, max_length, model.spec.num_layers + 1)

    def step(
        self, model: Decoder, adapter: Adapter, batch: Batch, sink: GradSink, step: Step
    ) -> float:
        """See `Method.step`."""
        ws, inputs = self._for_batch(model, batch, rows=model.spec.num_layers + 1)
        at = model.positions(batch.lengths)
        embed(model, batch.ids, inputs[0])
        x = blocks_forward(model, adapter, inputs, at, ws, step.dropout_seed)
        total = require_finite(loss_backward_(model, x, batch, ws, scale=step.scale))
        for layer in reversed(range(model.spec.num_layers)):

            def emit(linear: str, da: Tensor, db: Tensor, layer: int = layer) -> None:
                sink.add(parameter_name(layer, linear, "A"), da)
                sink.add(parameter_name(layer, linear, "B"), db)

            block = model.block(layer, adapter, step.dropout_seed)
            block_backward(x, inputs[layer], block, at, ws, emit=emit, input_gradient=layer > 0)
        return total

    def loss(self, model: Decoder, adapter: Adapter | None, batch: Batch) -> float:
        """See `Method.loss`. Uses the step's buffers, two rows of its block inputs among them."""
        ws, inputs = self._for_batch(model, batch, rows=2)
        at = model.positions(batch.lengths)
        embed(model, batch.ids, inputs[0])
        x = blocks_forward(model, adapter, inputs, at, ws)
        return float(loss_forward(model, x, batch, ws).sum())

    def _for_batch(self, model: Decoder, batch: Batch, rows: int) -> tuple[Workspace, Tensor]:
        """The workspace and `(rows, T, H)` block inputs for this batch."""
        tokens, hidden = sum(batch.lengths), model.spec.hidden_size
        ws, inputs = self._buffers(model, tokens, max(batch.lengths), rows)
        return ws, inputs[: rows * tokens * hidden].view(rows, tokens, hidden)

    def _buffers(
        self, model: Decoder, tokens: int, longest: int, rows: int
    ) -> tuple[Workspace, Tensor]:
        """The workspace and the flat block inputs, allocated again only to grow."""
        ws, inputs = self._ws, self._inputs
        if ws is None or self._for is not model or not ws.fits(tokens, longest):
            self._max_tokens = max(self._max_tokens, tokens)
            self._max_length = max(self._max_length, longest)
            self._ws = self._inputs = ws = inputs = None  # freed before new ones are made
            ws = self._ws = workspace_for(model, self._max_tokens, self._max_length)
            self._for = model
        needed = rows * self._max_tokens * model.spec.hidden_size
        if inputs is None or inputs.numel() < needed:
            self._inputs = inputs = None
            inputs = self._inputs = torch.empty(needed, dtype=model.compute_dtype)
        return ws, inputs
