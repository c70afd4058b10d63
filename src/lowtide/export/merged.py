"""A model with an adapter folded into its weights, some rows at a time, in float64.

    W' = W + s B A          LoRA
    W' = diag(m / n) V      DoRA, V = W + s B A, n_j = ||V_j||

Products are float64 whatever the dtypes: then what is written is the exact sum rounded once to the
dtype it is stored in (a float32 product would add its own `r + 2` roundings, which are as large as
the only one that is meant where weights are float32), and does not depend on threads or tiles.
With ranks this small it costs a few per cent of the time that reading and writing take.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lowtide.model.adapter import Adapter
from lowtide.model.decoder import Decoder
from lowtide.model.spec import EMBEDDING, HEAD
from lowtide.weights.mapping import file_spans
from lowtide.weights.matrix import StoredMatrix

_TILE_ELEMENTS = 1 << 18
"""Of W at a time: 2 MB, of which some five copies exist for a moment."""


class Tile(NamedTuple):
    """Rows `start:` of a tensor; good until the next one is asked for.

    Attributes:
        start: the first row.
        base: `(n, in)`, or `(n,)` of a vector, float64.
        merged: the same with the adapter; `base` itself where there is none.
    """

    start: int
    base: Tensor
    merged: Tensor


class Merged:
    """The tensors of a model under an adapter, by Hugging Face name."""

    def __init__(self, model: Decoder, adapter: Adapter | None) -> None:
        """Nothing is read yet.

        Args:
            model: computes in float64.
            adapter: fits it; None leaves all tensors as they are.
        """
        assert model.compute_dtype == torch.float64
        self.model, self.adapter = model, adapter
        self.shapes = model.spec.tensor_shapes()
        self._adapted = {
            f"model.layers.{layer}.{linear}.weight": (layer, linear)
            for layer, linear, _ in (adapter.config.adapted(model.spec) if adapter else ())
        }
        widest = max(shape[-1] for shape in self.shapes.values())
        self._open: StoredMatrix | None = None
        size = max(_TILE_ELEMENTS, widest)
        self._widened, self._summed = (torch.empty(size, dtype=torch.float64) for _ in range(2))

    @property
    def adapted(self) -> tuple[str, ...]:
        """Names of the tensors that the adapter changes, in the model's order."""
        return tuple(self._adapted)

    def tiles(self, name: str) -> Iterator[Tile]:
        """A tensor from its first row to its last.

        Args:
            name: of `shapes`.

        Yields:
            Tiles in order.
        """
        if len(self.shapes[name]) == 1:
            vector = self.model.checkpoint[name].double()
            yield Tile(0, vector, vector)
            return
        weight = self._matrix(name)
        rows, columns = weight.shape
        step = weight.rows_per_tile(self._widened)
        fold = self._fold(name)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            base = weight.rows(start, stop, self._widened)
            if fold is None:
                yield Tile(start, base, base)
            else:
                out = self._summed[: (stop - start) * columns].view(stop - start, columns)
                yield Tile(start, base, fold.rows_(out, base, slice(start, stop)))
        _release(weight)

    def tensor(self, name: str) -> Tensor | MergedRows:
        """A tensor for a writer that takes rows in an order of its own: a vector, or a matrix."""
        if len(self.shapes[name]) == 1:
            return self.model.checkpoint[name].double()
        weight = self._matrix(name)
        if self._open is not None and self._open is not weight:
            _release(self._open)
        self._open = weight
        return MergedRows(weight, self._fold(name))

    def magnitude(self, name: str, tile: Tile) -> Tensor:
        """What rounding errors of a tile's products are relative to: `c (|W| + s |B| |A|)`.

        Args:
            name: of a tensor that the adapter is on.
            tile: of it.

        Returns:
            `(n, in)`; c is 1 without DoRA.
        """
        fold = self._fold(name)
        assert fold is not None
        start, stop = tile.start, tile.start + len(tile.base)
        found = torch.addmm(
            tile.base.abs(), fold.b[start:stop].abs(), fold.a.abs(), alpha=fold.scale
        )
        if fold.m is not None:
            v = torch.addmm(tile.base, fold.b[start:stop], fold.a, alpha=fold.scale)
            found.mul_((fold.m[start:stop].abs() / v.norm(dim=1)).unsqueeze(1))
        return found

    def rank(self, name: str) -> int:
        """Of the adapter on a tensor."""
        fold = self._fold(name)
        return 0 if fold is None else len(fold.a)

    def _matrix(self, name: str) -> StoredMatrix:
        if name in (EMBEDDING, HEAD):
            return self.model.embedding if name == EMBEDDING else self.model.head
        _, _, layer, linear = name.removesuffix(".weight").split(".", 3)
        return self.model.linears[int(layer)][linear].weight

    def _fold(self, name: str) -> _Fold | None:
        if name not in self._adapted or self.adapter is None:
            return None
        place = self._adapted[name]
        lora = self.adapter.lora(*place, dropout_seed=None)
        assert lora is not None
        return _Fold(lora.a, lora.b, lora.scale, self.adapter.magnitude(*place))


def _release(weight: StoredMatrix) -> None:
    """Unmap what was read once: it would count as this process's memory."""
    for span in file_spans(weight.stored(0, weight.shape[0])) or ():
        span.release(from_cache=False)


class MergedRows:
    """A matrix of a model under an adapter, whose rows are made when they are asked for."""

    def __init__(self, weight: StoredMatrix, fold: _Fold | None) -> None:
        """Nothing is read yet."""
        self._weight, self._fold = weight, fold

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self._weight.shape

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Some rows, in float64."""
        places = torch.arange(self.shape[0])[rows] if isinstance(rows, slice) else rows
        base = torch.empty(len(places), self.shape[1], dtype=torch.float64)
        self._weight.take(places, base)
        if self._fold is None:
            return base
        return self._fold.rows_(torch.empty_like(base), base, places)


class _Fold(NamedTuple):
    """An adapter on one linear: `A (r, in)`, `B (out, r)`, s, and m `(out,)` under DoRA."""

    a: Tensor
    b: Tensor
    scale: float
    m: Tensor | None

    def rows_(self, out: Tensor, base: Tensor, rows: slice | Tensor) -> Tensor:
        """`out = W'[rows]` from `base = W[rows]`."""
        torch.addmm(base, self.b[rows], self.a, alpha=self.scale, out=out)
        if self.m is not None:
            norms = torch.linalg.vector_norm(out, dim=1)
            out.mul_((self.m[rows] / norms).unsqueeze(1))
        return out
