"""What an adapter takes in a step, in elements: its parameters, gradients, and what DoRA adds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowtide.model.adapter import LoraConfig, adapter_shapes
from lowtide.model.spec import ModelSpec
from lowtide.ops.lora_linear import DORA_ROWS

_MLP = ("gate", "up", "down")


@dataclass(frozen=True)
class AdapterShape:
    """An adapter on a model.

    Attributes:
        spec: the model.
        config: the adapter.
    """

    spec: ModelSpec
    config: LoraConfig

    @property
    def parameters(self) -> int:
        """All that is trained."""
        return sum(math.prod(shape) for shape in adapter_shapes(self.spec, self.config).values())

    @property
    def trained_blocks(self) -> int:
        """Blocks that a gradient passes through."""
        return len(self.config.trained_layers(self.spec))

    @property
    def of_block(self) -> int:
        """Parameters on one block, the largest where ranks differ."""
        return max(
            sum(rank * sum(self.spec.linear_shape(name)) + self._magnitude(name)
                for name, rank in ranks.items())
            for ranks in self._ranks()
        )  # fmt: skip

    def stored_h(self, tokens: int) -> int:
        """h of every adapted linear."""
        return tokens * sum(rank for _, _, rank in self.config.adapted(self.spec))

    @property
    def row_norms(self) -> int:
        """DoRA's norms, which are kept for a step."""
        return sum(self._magnitude(linear) for _, linear, _ in self.config.adapted(self.spec))

    def gradients(self, tokens: int) -> int:
        """Gradients of A and B that live at one time, and rank-sized products beside them."""
        return max(self._gradients_of(ranks, tokens) for ranks in self._ranks())

    def _ranks(self) -> list[dict[str, int]]:
        """Rank by linear of each adapted block, without repetition."""
        blocks: dict[int, dict[str, int]] = {}
        for layer, linear, rank in self.config.adapted(self.spec):
            blocks.setdefault(layer, {})[linear] = rank
        found: list[dict[str, int]] = []
        for ranks in blocks.values():
            if ranks not in found:
                found.append(ranks)
        return found

    def _magnitude(self, linear: str) -> int:
        return self.spec.linear_shape(linear)[0] if self.config.use_dora else 0

    def _gradients_of(self, ranks: dict[str, int], tokens: int) -> int:
        spec = self.spec
        inner, hidden = spec.intermediate_size, spec.hidden_size
        adapted = [one for one in spec.projections if one.name in ranks]
        mlp = [ranks[one.name] for one in adapted for role in one.roles if role in _MLP]
        # gate's and up's dB and down's dA grow over the tiles; then one is laid out for the sink.
        both = sum(mlp) * inner + max(mlp, default=0) * (inner + hidden)
        if self.config.use_dora:  # B times the factor, of gate and up
            both += sum(mlp) * inner
        # Those of a fused projection are held until its last role has come, and then joined.
        fused = [
            ranks[one.name] * (2 * spec.linear_shape(one.name)[0] + 2 * hidden)
            for one in adapted
            if len(one.roles) > 1
        ]
        single = [rank * sum(spec.linear_shape(name)) for name, rank in ranks.items()]
        return max(both, *fused, *single) + 6 * tokens * max(ranks.values())

    def dora(self, tokens: int, width: int, *, backward: bool, widened: bool) -> int:
        """What DoRA allocates and frees within a block, at its largest.

        Args:
            tokens: T.
            width: of a tile of the MLP.
            backward: whether there is one.
            widened: whether tiles of weights are copies.

        Returns:
            Elements beside the gradients; 0 without DoRA.
        """
        if not self.config.use_dora:
            return 0
        spec, linears = self.spec, self.config.linears(self.spec)
        hidden = spec.hidden_size
        roles = [role for one in spec.projections if one.name in linears for role in one.roles]
        inputs = sum(role in ("gate", "up") for role in roles)
        dropout = self.config.lora_dropout > 0.0
        mlp = inputs * tokens * hidden if dropout else 0  # the input as masked
        attention = 0
        if backward:
            mlp += inputs * tokens * (width + (hidden if dropout else 0))
            if "down" in roles:  # g, u, and the tile of W that is needed twice
                mlp += 2 * tokens * hidden + (width * hidden if widened else 0)
                mlp += tokens * width if dropout else 0
            if set(roles) - set(_MLP):
                attention = tokens * (DORA_ROWS + (max(hidden, spec.q_width) if dropout else 0))
        elif "down" in roles and dropout:
            mlp += tokens * hidden
        return max(mlp, attention)
