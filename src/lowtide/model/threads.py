"""How many CPU threads a model is worth."""

from __future__ import annotations

import torch

from .spec import ModelSpec

_WORTH_SHARING = 400_000


def set_threads(spec: ModelSpec, wanted: int | None) -> None:
    """Set torch's threads for this process.

    The operations of a model whose MLP matrices have under 400,000 entries are so short that
    handing them to a second thread costs more than it saves: such models get one.

    Args:
        spec: of the model.
        wanted: the user's number; None chooses.
    """
    if wanted is not None:
        torch.set_num_threads(wanted)
    elif spec.hidden_size * spec.intermediate_size < _WORTH_SHARING:
        torch.set_num_threads(1)
