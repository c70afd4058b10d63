"""MeSP: structured backpropagation (arXiv 2602.13069). Exact.

The forward keeps each block's input and nothing else; the first block embeds its own again. The
backward walks the blocks in reverse: it recomputes what a block's backward needs, h = x A^T
included, uses it and frees it. No autograd.

`keep_blocks = n` keeps the intermediates of the last n blocks, where there is memory to spare.

`recompute_h = no` keeps h of every adapted linear from the forward instead: 4 T r bytes each, the
paper's ablation.
"""

from __future__ import annotations

from lowtide.model.adapter import Adapter
from lowtide.model.batch import Batch
from lowtide.model.decoder import Decoder
from lowtide.model.kept import KeptBlocks, check_kept
from lowtide.model.stored_h import StoredH

from .base import GradSink, Step
from .buffers import Buffers
from .options import MethodOptions
from .structured import structured_losses, structured_step


class Mesp:
    """Keeps its buffers between steps and grows them when a larger batch comes."""

    name = "mesp"
    exact = True

    def __init__(self, options: MethodOptions | None = None) -> None:
        """Take `recompute_h` and `block_inputs` from the options."""
        options = options or MethodOptions()
        self._buffers = Buffers(options.block_inputs, options.tiles, options.scratch_dir)
        self._recompute_h = options.recompute_h
        self._stored_h: StoredH | None = None
        self._keep_blocks = options.keep_blocks
        self._kept: KeptBlocks | None = None

    def reserve(self, model: Decoder, max_tokens: int, max_length: int) -> None:
        """See `Method.reserve`."""
        self._keep(model, max_tokens)
        self._buffers.reserve(model, max_tokens, max_length, model.spec.num_layers + 1)

    def release(self) -> None:
        """See `Method.release`."""
        self._buffers.release()
        self._stored_h = self._kept = None

    def step(
        self, model: Decoder, adapter: Adapter, batch: Batch, sink: GradSink, step: Step
    ) -> float:
        """See `Method.step`."""
        if not self._recompute_h:
            tokens = max(self._buffers.max_tokens, sum(batch.lengths))
            if self._stored_h is None or not self._stored_h.fits(adapter, tokens):
                self._stored_h = None  # freed before a larger one is made
                self._stored_h = StoredH(adapter, tokens)
            self._stored_h.tokens = sum(batch.lengths)
        return structured_step(
            model, adapter, batch, sink, step,
            buffers=self._buffers, layers=adapter.config.trained_layers(model.spec),
            stored_h=self._stored_h, kept_blocks=self._keep(model, sum(batch.lengths), adapter),
        )  # fmt: skip

    def _keep(
        self, model: Decoder, tokens: int, adapter: Adapter | None = None
    ) -> KeptBlocks | None:
        """Room for the blocks to keep, made again only when a larger batch comes."""
        spec, number = model.spec, self._keep_blocks
        check_kept(number, spec, None if adapter is None else adapter.config)
        if number and (self._kept is None or not self._kept.fits(tokens)):
            self._kept = None  # freed before a larger one is made
            last = range(spec.num_layers - number, spec.num_layers)
            self._kept = KeptBlocks(spec, last, tokens, model.compute_dtype)
        return self._kept

    def loss(self, model: Decoder, adapter: Adapter | None, batch: Batch) -> float:
        """See `Method.loss`. Uses the step's buffers."""
        return float(structured_losses(model, adapter, batch, self._buffers).sum())
