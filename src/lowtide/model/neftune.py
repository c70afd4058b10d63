"""NEFTune (arXiv 2310.05914): noise on the embeddings in training.

    x_t += u,   u uniform in [-a, a),   a = alpha / sqrt(L H)

with L the tokens of the sequence, H the hidden size: the rule of transformers, whose L is the
length that a batch is padded to, and here, where nothing is padded, each sequence's own. The noise
is a hash of (seed, row, column), as dropout's mask is, so that what embeds again sees it again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lowtide.ops.dropout import add_uniform_

from .spec import ModelSpec


class Noise(NamedTuple):
    """The noise of one micro-batch: alpha, and the seed of what is drawn."""

    alpha: float
    seed: int

    def add_(self, x: Tensor, lengths: Sequence[int], spec: ModelSpec) -> Tensor:
        """Add it to embeddings.

        Args:
            x: `(T, H)`, changed.
            lengths: tokens of each sequence.
            spec: the model, which may multiply what its embedding gives.

        Returns:
            x.
        """
        start = 0
        for length in lengths:
            bound = self.alpha / math.sqrt(length * spec.hidden_size) * spec.noise_scale
            add_uniform_(x[start : start + length], bound, self.seed, start)
            start += length
        return x
