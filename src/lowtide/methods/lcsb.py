"""LCSB: layer-cyclic selective backpropagation (arXiv 2602.13073). Not exact.

Each step goes back through some of the blocks only. Past the others the residual path carries the
gradient unchanged, as if their branches were constants; their adapters get no gradient and rest.
The adapted blocks take turns, evenly spaced, so that each comes up equally often. Inputs of blocks
that rest are not kept, and nothing below the lowest block that is up is computed backwards.
"""

from __future__ import annotations

from lowtide.errors import ConfigError
from lowtide.model.adapter import Adapter
from lowtide.model.batch import Batch
from lowtide.model.decoder import Decoder

from .base import GradSink, Step
from .buffers import Buffers
from .options import MethodOptions
from .structured import structured_losses, structured_step


def blocks_of_turn(num_layers: int, per_step: int, turn: int) -> list[int]:
    """The blocks that are up.

    Args:
        num_layers: blocks of the model.
        per_step: how many are up at once.
        turn: the step, from 0.

    Returns:
        `per_step` blocks in order, evenly spaced, moved on by one with each turn.
    """
    return sorted(
        {(turn + number * num_layers // per_step) % num_layers for number in range(per_step)}
    )


class Lcsb:
    """Keeps its buffers between steps."""

    name = "lcsb"
    exact = False

    def __init__(self, options: MethodOptions | None = None) -> None:
        """Take `lcsb_blocks` from the options."""
        options = options or MethodOptions()
        self._per_step = options.lcsb_blocks
        self._buffers = Buffers(tiles=options.tiles)

    def _blocks(self, model: Decoder) -> int:
        """How many blocks are up in a step."""
        num_layers = model.spec.num_layers
        per_step = self._per_step or max(1, num_layers // 2)
        if per_step > num_layers:
            raise ConfigError(
                f"--lcsb-blocks is {per_step}, and the model has {num_layers} blocks. Use "
                f"{num_layers - 1} or less; --method mesp goes through all of them."
            )
        return per_step

    def reserve(self, model: Decoder, max_tokens: int, max_length: int) -> None:
        """See `Method.reserve`."""
        self._buffers.reserve(model, max_tokens, max_length, self._blocks(model) + 2)

    def release(self) -> None:
        """See `Method.release`."""
        self._buffers.release()

    def step(
        self, model: Decoder, adapter: Adapter, batch: Batch, sink: GradSink, step: Step
    ) -> float:
        """See `Method.step`; sends gradients of the blocks that are up only."""
        adapted = adapter.config.layers(model.spec)
        number = min(self._blocks(model), len(adapted))
        layers = [adapted[i] for i in blocks_of_turn(len(adapted), number, step.number)]
        return structured_step(
            model, adapter, batch, sink, step, buffers=self._buffers, layers=layers
        )

    def loss(self, model: Decoder, adapter: Adapter | None, batch: Batch) -> float:
        """See `Method.loss`."""
        return float(structured_losses(model, adapter, batch, self._buffers).sum())
