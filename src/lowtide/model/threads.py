"""How many CPU threads a model is worth."""

from __future__ import annotations

import torch

from lowtide.cores import usable_cores

from .spec import ModelSpec

_WORTH_SHARING = 400_000


def set_threads(spec: ModelSpec, wanted: int | None) -> None:
    """Set torch's threads for this process.

    The operations of a model whose MLP matrices have under 400,000 entries are so short that
    handing them to a second thread costs more than it saves: such models get one. Others get a
    thread per core that the process may use, or fewer where torch was told so (OMP_NUM_THREADS).

    Args:
        spec: of the model.
        wanted: the user's number; None chooses.
    """
    if wanted is not None:
        torch.set_num_threads(wanted)
    elif spec.hidden_size * spec.intermediate_size < _WORTH_SHARING:
        torch.set_num_threads(1)
    else:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
