"""`h = x A^T` of every adapted linear kept from the forward: what MeSP does without."""

from __future__ import annotations

import torch
from torch import Tensor

from lowtide.ops.lora_linear import Lora

from .adapter import Adapter, parameter_name


class StoredH:
    """One `(r, T)` piece per adapted linear, all in one tensor: `r T` elements each.

    Attributes:
        tokens: T of the batch at hand.
    """

    def __init__(self, adapter: Adapter, max_tokens: int) -> None:
        """Make room for batches of up to `max_tokens` tokens."""
        self._ranks = _ranks(adapter)
        sizes = [rank * max_tokens for rank in self._ranks.values()]
        self._flat = torch.empty(sum(sizes), dtype=adapter.compute_dtype)
        self._parts = dict(zip(self._ranks, torch.split(self._flat, sizes), strict=True))
        self._max_tokens = max_tokens
        self.tokens = max_tokens

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self._flat.numel() * self._flat.element_size()

    def fits(self, adapter: Adapter, tokens: int) -> bool:
        """Whether that many tokens of an adapter of this shape fit."""
        return tokens <= self._max_tokens and _ranks(adapter) == self._ranks

    def on(self, adapter: Adapter, *, ready: bool) -> Adapter:
        """`adapter` with its h to be written (forward) or read (backward).

        Args:
            adapter: of the shape that room was made for.
            ready: True once the forward has written h.

        Returns:
            The adapter with references into the store.
        """
        return _WithH(adapter, self, ready)

    def h(self, name: str) -> Tensor:
        """The piece `(r, T)` of the A of that PEFT name."""
        rank = self._ranks[name]
        return self._parts[name][: rank * self.tokens].view(rank, -1)


def _ranks(adapter: Adapter) -> dict[str, int]:
    """Rank by PEFT name of every A."""
    return {name: p.shape[0] for name, p in adapter.items() if ".lora_A." in name}


class _WithH(Adapter):
    """An adapter whose linears keep their h in a store."""

    def __init__(self, adapter: Adapter, store: StoredH, ready: bool) -> None:
        super().__init__(adapter.config, adapter.parameters, adapter.compute_dtype)
        self._store, self._ready = store, ready

    def lora(self, layer: int, linear: str, dropout_seed: int | None) -> Lora | None:
        lora = super().lora(layer, linear, dropout_seed)
        if lora is None:
            return None
        h = self._store.h(parameter_name(layer, linear, "A"))
        return lora._replace(h=h, h_ready=self._ready)
