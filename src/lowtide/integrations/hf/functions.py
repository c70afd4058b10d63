"""The structured block and the loss of one sweep as functions that autograd knows."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowtide.errors import ConfigError
from lowtide.model.adapter import MAGNITUDE, MATRICES, parameter_name
from lowtide.model.batch import Batch
from lowtide.model.block import Block, Positions, block_backward, block_forward
from lowtide.model.forward import loss_backward_, loss_forward
from lowtide.model.row_norms import RowNorms
from lowtide.model.workspace import Workspace
from lowtide.ops.cross_entropy import Distribution

from .inner import Inner, ModuleAdapter


class Run(NamedTuple):
    """One call of the model: what its blocks share, until their backward.

    Attributes:
        inner: weights and adapter.
        adapter: the same adapter, which is there.
        at: segments and rotary tables.
        ws: buffers; nothing in them outlives one block.
        seed: of LoRA dropout; None for none.
        norms: of DoRA.
    """

    inner: Inner
    adapter: ModuleAdapter
    at: Positions
    ws: Workspace
    seed: int | None
    norms: RowNorms

    def block(self, layer: int) -> Block:
        """Weights of a block, with the adapter on them."""
        return self.inner.decoder.block(layer, self.adapter, self.seed, self.norms)


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off: lowtide's products stay in the dtype that it computes in."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


class _Block(torch.autograd.Function):
    """Keeps the block's input; its parameters too, to see that nobody changes them meanwhile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Run, layer: int, *parameters: Tensor) -> Tensor:
        ctx.run, ctx.layer = run, layer
        ctx.save_for_backward(x, *parameters)
        out = torch.empty_like(x)
        with no_autocast(x):
            block_forward(x, run.block(layer), run.at, run.ws, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        run, layer = ctx.run, ctx.layer
        x, *parameters = ctx.saved_tensors
        found: dict[str, Tensor] = {}

        def emit(linear: str, *grads: Tensor) -> None:
            for part, grad in zip((*MATRICES, MAGNITUDE), grads, strict=False):
                found[parameter_name(layer, linear, part)] = grad

        dx = dy.clone(memory_format=torch.contiguous_format)
        below = ctx.needs_input_grad[0]
        with no_autocast(x):
            block_backward(dx, x, run.block(layer), run.at, run.ws, emit=emit, input_gradient=below)
        grads = [
            found[name].to(parameter.dtype) if needed else None
            for name, parameter, needed in zip(
                run.adapter.names_in(layer), parameters, ctx.needs_input_grad[3:], strict=True
            )
        ]
        return dx if below else None, None, None, *grads


class _Loss(torch.autograd.Function):
    """Losses of the labelled positions; keeps the gradient of their sum, `(T, H)`.

    Each row of that gradient comes from its own loss, so a weight of a loss is one of its row.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, run: Run, batch: Batch, of: Distribution | None, backward: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.batch = batch
        decoder = run.inner.decoder
        with no_autocast(x):
            if backward:
                dx = x.clone()
                losses = loss_backward_(decoder, dx, batch, run.ws, scale=1.0, distribution=of)
                ctx.save_for_backward(dx)
            else:
                losses = loss_forward(decoder, x, batch, run.ws, of)
        return losses, None if of is None else of.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor | None, dentropy: Tensor | None) -> tuple[Any, ...]:
        if dentropy is not None:
            raise ConfigError(
                "a loss has a term of the entropy, whose gradient lowtide does not form; detach "
                "it, or unpatch the model."
            )
        (dx,) = ctx.saved_tensors
        if dlosses is None:
            return None, None, None, None, None
        weights = dx.new_zeros(len(dx), 1)
        weights[ctx.batch.labelled, 0] = dlosses.to(dx.dtype)
        return dx * weights, None, None, None, None


def blocks(x: Tensor, run: Run) -> Tensor:
    """The last block's output `(T, H)` from the embeddings `(T, H)`."""
    for layer in range(run.inner.decoder.spec.num_layers):
        trained = [run.adapter.trained[name] for name in run.adapter.names_in(layer)]
        x = _Block.apply(x, run, layer, *trained)  # type: ignore[no-untyped-call]
    return x


def losses_of(
    x: Tensor, run: Run, batch: Batch, distribution: Distribution | None
) -> tuple[Tensor, Tensor | None]:
    """Losses `(n_tokens,)` of the labelled positions, and their entropies where they are wanted.

    Args:
        x: `(T, H)`, the last block's output.
        run: of this call.
        batch: for the labels.
        distribution: filled; None spares it.

    Returns:
        Losses, differentiable, and entropies, which are not.
    """
    backward = torch.is_grad_enabled() and x.requires_grad
    found: tuple[Tensor, Tensor | None] = _Loss.apply(  # type: ignore[no-untyped-call]
        x, run, batch, distribution, backward
    )
    return found
