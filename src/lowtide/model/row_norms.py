"""Lengths of the rows of adapted weights, for DoRA: formed once, kept for a step's backward."""

from __future__ import annotations

import torch
from torch import Tensor

from lowtide.ops.dora import row_norms_
from lowtide.ops.frozen import FrozenMatrix
from lowtide.ops.lora_linear import Lora

from .adapter import Adapter


class RowNorms:
    """`||W + s B A||` by row of every linear under DoRA, all in one tensor: `out` elements each.

    Good for as long as the adapter stays as it is.
    """

    def __init__(self, adapter: Adapter | None, scratch: Tensor) -> None:
        """Nothing is formed yet.

        Args:
            adapter: whose magnitudes name the linears.
            scratch: flat buffer in the compute dtype, overwritten when a norm is formed; at least
                two rows of any adapted weight.
        """
        self._scratch = scratch
        sizes = {} if adapter is None else {n: p.numel() for n, p in adapter.magnitudes()}
        flat = scratch.new_empty(sum(sizes.values()))
        self._parts = dict(zip(sizes, torch.split(flat, list(sizes.values())), strict=True))
        self._formed: set[str] = set()

    def of(self, name: str, weight: FrozenMatrix, lora: Lora) -> Tensor:
        """The norms `(out,)` of a linear.

        Args:
            name: PEFT's, of its magnitude.
            weight: W.
            lora: A, B and s.

        Returns:
            A view, whose content is formed at the first call.
        """
        norm = self._parts[name]
        if name not in self._formed:
            row_norms_(norm, weight, lora.a, lora.b, lora.scale, self._scratch)
            self._formed.add(name)
        return norm
