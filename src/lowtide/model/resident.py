"""How much of a model's mapped weights may be in memory at once."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING

from lowtide.errors import ConfigError
from lowtide.memory.available import available_bytes
from lowtide.memory.measure import read_memory
from lowtide.sizes import size_in_bytes
from lowtide.weights.residency import Residency, watch_matrices

if TYPE_CHECKING:
    from .decoder import Decoder

# Left free beside a limit that is chosen here: page tables and other memory of the kernel's, and
# what a step allocates for a moment.
_SPARE_BYTES = 32_000_000


def limit_resident(model: Decoder, limit: int | str | None) -> Residency | None:
    """Set the limit, or choose one where there is no room for all weights.

    Args:
        model: just loaded.
        limit: bytes or a size as text; None chooses.

    Returns:
        What keeps the limit, or None where there is none.

    Raises:
        ConfigError: the limit is no size, smaller than two pieces of the model, or the system does
            not tell where files are mapped.
    """
    fits = model.checkpoint.nbytes + _SPARE_BYTES <= available_bytes()
    if limit is None:
        return None if fits else _watched(model, None, from_cache=True)
    wanted = size_in_bytes("resident_weights", limit)
    residency = _watched(model, wanted, from_cache=not fits)
    if residency is None:
        raise ConfigError(
            f"--resident-weights needs Linux: {sys.platform} does not say where files are mapped. "
            "Leave it out; the system keeps what fits."
        )
    if wanted < residency.smallest_limit:
        raise ConfigError(
            f"--resident-weights {limit} is {wanted:,} bytes, and {model.path} needs at least "
            f"{residency.smallest_limit:,}: a block in use and the next one being read. Give at "
            "least that much."
        )
    return residency


def _watched(model: Decoder, limit: int | None, *, from_cache: bool) -> Residency | None:
    blocks = [[linear.weight for linear in linears.values()] for linears in model.linears]

    @cache
    def libraries() -> int:
        """File pages before the first block is used; dropped, they would be read again at once."""
        mapped = read_memory()
        return mapped.rss_bytes - mapped.anon_bytes

    def chosen() -> int:
        return available_bytes() - libraries() - _SPARE_BYTES if limit is None else limit

    return watch_matrices(blocks, model.head, model.embedding, chosen, from_cache=from_cache)
