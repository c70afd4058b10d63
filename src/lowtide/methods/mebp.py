"""MeBP: memory-efficient backpropagation (arXiv 2510.03425). Exact.

Each block is a checkpoint: the forward keeps block inputs only, and the backward runs a block again
under autograd, takes its gradients and frees its graph before it turns to the block before.

What `mesp` is compared with, so as lean as autograd allows: frozen products widen their 16-bit
weight tile by tile, in the backward a second time, and let autograd keep nothing of it; attention
is torch's fused one, which keeps no scores; block inputs and the loss's buffers are `mesp`'s own.
What autograd keeps of a block stays: its whole `(T, I)` activations among them. `mebp_loss = full`
forms all logits, as the paper's baseline does; `sweep` is the loss of `mesp`, so that the effect
of the loss and that of the blocks can be told apart.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowtide.model.adapter import Adapter
from lowtide.model.batch import IGNORED, Batch
from lowtide.model.decoder import Decoder
from lowtide.model.forward import embed, embed_batch, loss_backward_, loss_forward
from lowtide.model.reference import (
    Kernels,
    plain_attention,
    reference_block,
    reference_head,
    visible,
)
from lowtide.model.workspace import Workspace
from lowtide.ops.attention import Heads
from lowtide.ops.dora import row_norms_
from lowtide.ops.frozen import matmul_, matmul_t_
from lowtide.weights.matrix import StoredMatrix

from .base import GradSink, Step, require_finite
from .buffers import Buffers
from .options import MethodOptions


class _FrozenProduct(torch.autograd.Function):
    """`y = x W^T`, `dx = dy W`: saves nothing, and widens W tile by tile both times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: StoredMatrix, tile: Tensor) -> Tensor:
        ctx.weight, ctx.tile = weight, tile
        y = x.new_empty(x.shape[0], weight.shape[0])
        matmul_(y, x, weight, tile)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (dy,) = grads
        dx = dy.new_zeros(dy.shape[0], ctx.weight.shape[1])
        matmul_t_(dx, dy, ctx.weight, ctx.tile)
        return dx, None, None


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
    """torch's own; a softcap, which it does not know, needs the whole score matrix."""
    if heads.softcap:
        return plain_attention(q, k, v, heads)
    seen = visible(q.shape[1], heads) if heads.window else None
    q, k, v = (t.unsqueeze(0) for t in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=seen is None, scale=heads.factor
    ).squeeze(0)


def lean_kernels(tile: Tensor) -> Kernels:
    """Kernels that widen weights into `tile`, a flat buffer."""

    def product(x: Tensor, weight: StoredMatrix) -> Tensor:
        y: Tensor = _FrozenProduct.apply(x, weight, tile)  # type: ignore[no-untyped-call]  # torch does not type it
        return y

    def norms(weight: StoredMatrix, a: Tensor, b: Tensor, scale: float) -> Tensor:
        found = a.new_empty(weight.shape[0])
        row_norms_(found, weight, a, b, scale, tile)
        return found

    return Kernels(product, _fused_attention, norms)


class Mebp:
    """Keeps block inputs and the loss's buffers between steps."""

    name = "mebp"
    exact = True

    def __init__(self, options: MethodOptions | None = None) -> None:
        """Take `mebp_loss` and `block_inputs` from the options."""
        options = options or MethodOptions()
        self._full_loss = options.mebp_loss == "full"
        self._buffers = Buffers(options.block_inputs, scratch_dir=options.scratch_dir)

    def reserve(self, model: Decoder, max_tokens: int, max_length: int) -> None:
        """See `Method.reserve`."""
        self._buffers.reserve(model, max_tokens, max_length, model.spec.num_layers + 1)

    def release(self) -> None:
        """See `Method.release`."""
        self._buffers.release()

    def step(
        self, model: Decoder, adapter: Adapter, batch: Batch, sink: GradSink, step: Step
    ) -> float:
        """See `Method.step`."""
        ws, inputs = self._buffers.for_batch(model, batch, model.spec.num_layers + 1)
        seed = step.dropout_seed
        kernels = lean_kernels(ws.linear_tile)
        with torch.no_grad():
            embed_batch(model, batch, inputs[0], step.noise)
            for layer in range(model.spec.num_layers):
                x = reference_block(model, adapter, layer, inputs[layer], batch, seed, kernels)
                inputs[layer + 1].copy_(x)
        total = self._loss_backward_(model, inputs[-1], batch, ws, step.scale)
        dy = inputs[-1]
        trained = adapter.config.trained_layers(model.spec)
        for layer in reversed(trained):
            leaves = adapter.leaves(layer)
            below = layer > trained[0]
            x = inputs[layer].detach().requires_grad_(below)
            wanted = [*([x] if below else []), *leaves.values()]
            with torch.enable_grad():
                tracked = Adapter(adapter.config, leaves)
                y = reference_block(model, tracked, layer, x, batch, seed, kernels)
                # Its gradient is dy. Handing dy to autograd.grad would import sympy: 42 MB.
                product = torch.dot(y.flatten(), dy.flatten())
            grads = list(torch.autograd.grad(product, wanted))
            del y, product
            if below:
                dy = grads.pop(0)
            for name in leaves:
                sink.add(name, grads.pop(0))
        return total

    def _loss_backward_(
        self, model: Decoder, x: Tensor, batch: Batch, ws: Workspace, scale: float
    ) -> float:
        """Sum of the losses; `x` becomes the gradient of `scale` times it."""
        if not self._full_loss:
            return require_finite(loss_backward_(model, x, batch, ws, scale=scale))
        output = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            logits = reference_head(model, output, lean_kernels(ws.linear_tile))
            loss = F.cross_entropy(logits, batch.targets, ignore_index=IGNORED, reduction="sum")
            del logits
            total = require_finite(loss.detach())
            (dx,) = torch.autograd.grad(loss * scale, output)
        x.copy_(dx)
        return total

    def loss(self, model: Decoder, adapter: Adapter | None, batch: Batch) -> float:
        """See `Method.loss`: the forward of `step`, and the sweep over the vocabulary."""
        ws, inputs = self._buffers.for_batch(model, batch, 1)
        kernels = lean_kernels(ws.linear_tile)
        with torch.no_grad():
            x = inputs[0]
            embed(model, batch.ids, x)
            for layer in range(model.spec.num_layers):
                x = reference_block(model, adapter, layer, x, batch, None, kernels)
            return float(loss_forward(model, x, batch, ws).sum())
