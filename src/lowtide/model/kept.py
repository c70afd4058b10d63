"""Intermediates of some blocks, kept from the forward: memory for time."""

from __future__ import annotations

from collections.abc import Collection

import torch

from lowtide.errors import ConfigError
from lowtide.ops.glu import Columns

from .block import Kept
from .lora_config import LoraConfig
from .spec import ModelSpec


class KeptBlocks:
    """Room for what the backward of some blocks would recompute, all in one tensor."""

    def __init__(
        self, spec: ModelSpec, layers: Collection[int], max_tokens: int, dtype: torch.dtype
    ) -> None:
        """Make room for batches of up to `max_tokens` tokens; `layers` are 0-based."""
        self._spec, self._max_tokens = spec, max_tokens
        self._flat = torch.empty(len(layers), kept_elements(spec) * max_tokens, dtype=dtype)
        self._places = {layer: place for place, layer in enumerate(sorted(layers))}
        self._blocks: dict[int, Kept] = {}

    def fits(self, tokens: int) -> bool:
        """Whether a batch of that many tokens fits."""
        return tokens <= self._max_tokens

    def start(self, tokens: int) -> None:
        """Begin a step: forget what was kept, and take the shapes of this batch."""
        spec = self._spec
        widths = _widths(spec)
        for layer, place in self._places.items():
            row = self._flat[place, : kept_elements(spec) * tokens]
            parts = torch.split(row, [tokens * width for width in widths])
            q, k, v, o, mid, gate, up, *more = (part.view(tokens, -1) for part in parts)
            branch = more.pop() if spec.norms.after_mlp else None
            self._blocks[layer] = Kept(
                q, k, v, o, mid, columns=Columns(gate, up), raw=more, branch=branch
            )

    def of(self, layer: int) -> Kept | None:
        """What is kept of a block in this step; None where nothing is."""
        return self._blocks.get(layer)


def _widths(spec: ModelSpec) -> tuple[int, ...]:
    """Of q, k, v, o, the middle residual, gate, up; q and k before norms, the MLP's before its."""
    q, kv, inner = spec.q_width, spec.kv_width, spec.intermediate_size
    more = (q, kv) if spec.qk_norm else ()
    branch = (spec.hidden_size,) if spec.norms.after_mlp else ()
    return (q, kv, kv, q, spec.hidden_size, inner, inner, *more, *branch)


def kept_elements(spec: ModelSpec) -> int:
    """Elements per token that one kept block takes."""
    return sum(_widths(spec))


def check_kept(number: int, spec: ModelSpec, config: LoraConfig | None) -> None:
    """Refuse to keep blocks that no backward goes through.

    Args:
        number: how many of the last blocks shall keep their intermediates.
        spec: the model.
        config: of the adapter; None where it adapts all blocks.

    Raises:
        ConfigError: there are not so many.
    """
    trained = spec.num_layers if config is None else len(config.trained_layers(spec))
    if number > spec.num_layers:
        raise ConfigError(f"--keep-blocks is {number}, and the model has {spec.num_layers} blocks.")
    if number > trained:
        raise ConfigError(
            f"--keep-blocks is {number}, and a gradient passes through {trained} "
            f"block{'s'[: trained > 1]} only, those from the lowest adapted one up."
        )
