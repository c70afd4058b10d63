"""`h = x A^T` of every adapted linear kept from the forward: what MeSP does without."""

from __future__ import annotations

import torch
from torch import Tensor

from lowtide.ops.glu import Glu
from lowtide.ops.lora_linear import Linear

from .adapter import Adapter, parameter_name
from .block import Block
from .spec import LINEARS


class StoredH:
    """One `(r, T)` piece per adapted linear, all in one tensor: `r T` elements each.

    Attributes:
        tokens: T of the batch at hand.
    """

    def __init__(self, adapter: Adapter, max_tokens: int) -> None:
        """Make room for batches of up to `max_tokens` tokens."""
        names = [name for name, _ in adapter.items() if ".lora_A." in name]
        rank = adapter.config.r
        self._flat = torch.empty(len(names), rank * max_tokens, dtype=adapter.compute_dtype)
        self._places = {name: place for place, name in enumerate(names)}
        self._rank, self._max_tokens = rank, max_tokens
        self.tokens = max_tokens

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self._flat.numel() * self._flat.element_size()

    def fits(self, adapter: Adapter, tokens: int) -> bool:
        """Whether that many tokens of an adapter of this shape fit."""
        known = all(name in self._places for name, _ in adapter.items() if ".lora_A." in name)
        return known and adapter.config.r == self._rank and tokens <= self._max_tokens

    def on(self, block: Block, layer: int, *, ready: bool) -> Block:
        """`block` with its h to be written (forward) or read (backward).

        Args:
            block: of `layer`.
            layer: 0-based.
            ready: True once the forward has written it.

        Returns:
            The block with references into the store.
        """
        q, k, v, o, gate, up, down = (
            self._with_h(linear, parameter_name(layer, name, "A"), ready)
            for name, linear in zip(LINEARS, _linears(block), strict=True)
        )
        return block._replace(q=q, k=k, v=v, o=o, glu=Glu(gate, up, down))

    def _with_h(self, linear: Linear, name: str, ready: bool) -> Linear:
        if linear.lora is None:
            return linear
        return linear._replace(lora=linear.lora._replace(h=self._h(name), h_ready=ready))

    def _h(self, name: str) -> Tensor:
        return self._flat[self._places[name], : self._rank * self.tokens].view(self._rank, -1)


def _linears(block: Block) -> tuple[Linear, ...]:
    """In the order of LINEARS."""
    return (block.q, block.k, block.v, block.o, *block.glu)
