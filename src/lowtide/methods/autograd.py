"""The plain reference: autograd over the readable forward, everything kept. Exact."""

from __future__ import annotations

import torch

from lowtide.model.adapter import Adapter
from lowtide.model.batch import Batch
from lowtide.model.decoder import Decoder
from lowtide.model.reference import reference_loss

from .base import GradSink, Step, require_finite
from .options import MethodOptions


class Autograd:
    """Memory grows with every activation of every block; use it as a truth, not to train."""

    name = "autograd"
    exact = True

    def __init__(self, options: MethodOptions | None = None) -> None:
        """It has no options."""

    def reserve(self, model: Decoder, max_tokens: int, max_length: int) -> None:
        """See `Method.reserve`. Autograd allocates as it goes."""

    def release(self) -> None:
        """See `Method.release`. Nothing is kept."""

    def step(
        self, model: Decoder, adapter: Adapter, batch: Batch, sink: GradSink, step: Step
    ) -> float:
        """See `Method.step`."""
        leaves = adapter.leaves()
        with torch.enable_grad():
            tracked = Adapter(adapter.config, leaves)
            loss = reference_loss(model, tracked, batch, step.dropout_seed, step.noise)
            total = require_finite(loss.detach())
            grads = torch.autograd.grad(loss * step.scale, list(leaves.values()))
        for name, grad in zip(leaves, grads, strict=True):
            sink.add(name, grad)
        return total

    def loss(self, model: Decoder, adapter: Adapter | None, batch: Batch) -> float:
        """See `Method.loss`."""
        with torch.no_grad():
            return float(reference_loss(model, adapter, batch))
