"""The buffers of a step: allocated once for the largest batch and reused by every block.

Five hidden-sized buffers, four of key/value width, one region of widened weight tiles, one of MLP
columns or logits, and two of attention scores; a sixth hidden-sized one where a norm or a factor
follows the MLP, and room for q and k before their norms where they have any. The roles below never
overlap in time:

    wide[0]  n         normalised rows: attention's, then the MLP's, then attention's again
    wide[1]  q         queries, then their gradient; the final norm's labelled rows in the loss
    wide[2]  o         attention output; E[label] in the loss
    wide[3]  mid       the residual between attention and MLP, then the gradient of o
    wide[4]  dn        gradient of a norm's output, and scratch of rope; a branch before its norm
    wide[5]  db        gradient of a branch before its norm or factor
    narrow   k, v, dk, dv
    raw      q and k before their norms
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowtide.ops.attention import score_elements
from lowtide.ops.cross_entropy import LossBuffers
from lowtide.ops.fused_attention import available
from lowtide.ops.glu import GluBuffers
from lowtide.ops.products import goes_to_onednn

from .spec import ModelSpec

_TILE_ELEMENTS = 420 * 1024
_ACTIVATION_ELEMENTS = 448 * 1024
_MIN_WIDTH, _MAX_WIDTH = 64, 512


TILES = {"full": 1, "half": 2, "quarter": 4}
"""Sizes of tiles, and what the usual one is divided by."""


def mlp_tile_width(spec: ModelSpec, tokens: int, tiles: str = "full") -> int:
    """Columns of the intermediate size that one MLP tile covers.

    About 1.7 MB of float32 weight per tile, narrower for long batches so that the activations of a
    tile stay small too; at least 64 so that products stay efficient.
    """
    by_weight = _TILE_ELEMENTS // spec.hidden_size
    by_tokens = max(320, _ACTIVATION_ELEMENTS // max(1, tokens))
    width = max(_MIN_WIDTH, min(by_weight, by_tokens, _MAX_WIDTH) // TILES[tiles])
    width = min(width, spec.intermediate_size)
    if not goes_to_onednn():
        return width
    # Each size that the tiles of a width leave over is another shape of every product.
    near = range(min(5 * width // 4, spec.intermediate_size), width // 2, -1)
    return min(near, key=lambda w: (w % 16 > 0, len(_tile_sizes(spec, w))))


def _tile_sizes(spec: ModelSpec, width: int) -> set[int]:
    """Rows of the tiles that the matrices of a model are cut into, `width` rows at a time."""
    rows = (spec.intermediate_size, spec.hidden_size, spec.q_width, spec.kv_width, spec.vocab_size)
    return {min(width, count) for count in rows} | {count % width for count in rows} - {0}


def score_capacity(spec: ModelSpec, max_length: int) -> int:
    """Elements of a score buffer for sequences of up to `max_length`, in any of the blocks."""
    group = spec.num_heads // spec.num_kv_heads
    return max(score_elements(heads.reach(max_length), group) for heads in spec.kinds_of_heads())


def _scratch_width(spec: ModelSpec) -> int:
    """Columns of wide[4] that a forward pass alone touches: rope's, or a branch before its norm."""
    rotated = [
        max(spec.num_heads, spec.num_kv_heads) * (rope.rotated or spec.head_dim) // 2
        for rope in spec.ropes
    ]
    apart = spec.norms.after_attention is not None or spec.scales_branches
    return max(*rotated, spec.hidden_size if apart else 0)


class Workspace:
    """Buffers for batches of up to `max_tokens` tokens in sequences of up to `max_length`.

    Pages that a smaller batch does not touch are never backed by memory.
    """

    def __init__(
        self,
        spec: ModelSpec,
        max_tokens: int,
        max_length: int,
        dtype: torch.dtype,
        tiles: str = "full",
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate everything, without touching it; `tiles` is a key of `TILES`."""

        def room(elements: int) -> Tensor:
            return torch.empty(elements, dtype=dtype, device=device)

        self.spec = spec
        self.max_tokens = max_tokens
        self.max_length = max_length
        self.dtype = dtype
        width = mlp_tile_width(spec, max_tokens, tiles)
        hidden, either = spec.hidden_size, max(spec.hidden_size, spec.q_width)
        scratch = max(hidden, spec.q_width // 2, spec.kv_width // 2)
        self._wide = [
            room(max_tokens * columns) for columns in (hidden, either, either, either, scratch)
        ]
        if spec.scales_branches:
            self._wide.append(room(max_tokens * hidden))
        self._narrow = [room(max_tokens * spec.kv_width) for _ in range(4)]
        self._raw = room(max_tokens * spec.raw_width)
        # One row of o's matrix must fit, also where heads are wider than such a tile.
        half = max(width * hidden, -(-spec.q_width // 2))
        self.tile = room(2 * half)
        # As many rows as the MLP's tiles have, where each shape of a product costs memory.
        self.linear_tile = self.tile[:half] if goes_to_onednn() else self.tile
        self._columns = room(4 * width * max_tokens)
        scores = score_capacity(spec, max_length)
        self.scores = [room(scores) for _ in range(2)]
        self.glu = GluBuffers(
            tiles=self.tile.chunk(2), activations=self._columns.chunk(4), width=width
        )
        self.loss = LossBuffers(tile=self.linear_tile, logits=self._columns)

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        parts = [*self._wide, *self._narrow, self._raw, self.tile, self._columns, *self.scores]
        return sum(part.numel() for part in parts) * self.dtype.itemsize

    def untouched_bytes(
        self, *, backward: bool, widened: bool, recomputes: bool, apart: bool = False
    ) -> int:
        """Bytes reserved that a step of the largest batch never touches.

        Args:
            backward: whether there is one.
            widened: whether tiles are copies of the weights in another dtype.
            recomputes: whether any block is recomputed, instead of all being kept.
            apart: whether an adapter has branches formed apart from their residual, as DoRA does.

        Returns:
            Their sum.
        """
        spec, tokens = self.spec, self.max_tokens
        parts = [] if widened else [self.tile]
        fused = available(self.dtype) and all(
            heads.is_plain(self.max_length) for heads in spec.kinds_of_heads()
        )
        if fused:
            parts += self.scores
        if not backward:
            touched = tokens * max(_scratch_width(spec), spec.hidden_size if apart else 0)
            parts += [self._wide[3], self._wide[4][touched:], *self._wide[5:]]
            parts += self._narrow[2:]
            parts += [] if fused else self.scores[1:]
            if not apart:
                parts += self.glu.activations[2:]
                parts += [self.tile[len(self.linear_tile) :]] if widened else []
        elif not recomputes:
            parts += [wide[tokens * spec.hidden_size :] for wide in self._wide[1:3]]
            parts += [*self._narrow[:2], self._raw]
            # What is kept of G and U lies elsewhere; the loss takes one piece, or two.
            one_piece = len(self.linear_tile) < len(self.tile) and not spec.logit_softcap
            parts += [self.glu.activations[1]] if one_piece and not apart else []
        return sum(part.numel() for part in parts) * self.dtype.itemsize

    def fits(self, tokens: int, length: int) -> bool:
        """Whether a batch of that many tokens and that longest sequence fits."""
        return tokens <= self.max_tokens and length <= self.max_length

    def wide(self, index: int, tokens: int, width: int) -> Tensor:
        """Hidden-sized buffer `index` as `(tokens, width)`."""
        return self._wide[index][: tokens * width].view(tokens, width)

    def narrow(self, index: int, tokens: int) -> Tensor:
        """Key/value-sized buffer `index` as `(tokens, kv_width)`."""
        width = self.spec.kv_width
        return self._narrow[index][: tokens * width].view(tokens, width)

    def raw(self, tokens: int) -> tuple[Tensor, ...]:
        """Room for q and k before their norms, `(tokens, width)` each; nothing without norms."""
        spec = self.spec
        if not spec.raw_width:
            return ()
        widths = [tokens * spec.q_width, tokens * spec.kv_width]
        parts = torch.split(self._raw[: tokens * spec.raw_width], widths)
        return tuple(part.view(tokens, -1) for part in parts)

    def rope_scratch(self) -> Tensor:
        """A flat buffer that is free whenever rope runs."""
        return self._wide[4]
