"""`--deterministic`: bytes that follow from the settings and the seed, whatever the cores.

Sums depend on how they are shared out. Left to itself, a run takes as many threads as there are
cores, the library that suits the processor, and with a memory budget the tiles that fit; each of
them adds in an order of its own. Here all three are settings, written into run.yaml, and a run
that would go on with others is refused.
"""

from __future__ import annotations

import os
from dataclasses import replace

from lowtide.errors import ConfigError

from .settings import TrainSettings

_LIMIT = "OMP_THREAD_LIMIT"


def pinned(settings: TrainSettings) -> TrainSettings:
    """The settings with all that rounding depends on decided, where that is asked for.

    Args:
        settings: of a run.

    Returns:
        The same settings, or those with a number of threads and a library for products.

    Raises:
        ConfigError: what was asked for cannot be had.
    """
    if not settings.deterministic:
        return settings
    if settings.memory_budget is not None and "%" in settings.memory_budget:
        raise ConfigError(
            f"--memory-budget {settings.memory_budget} is another budget whenever another share of "
            "the memory is free, and --deterministic wants the same tiles each time. Give a size, "
            "such as 400MB."
        )
    threads = settings.threads or 1
    limit = os.environ.get(_LIMIT, "")
    if limit.isdigit() and int(limit) < threads:
        raise ConfigError(
            f"--threads {threads} with --deterministic: {_LIMIT}={limit} in the environment allows "
            f"fewer. Unset it, or give --threads {limit}."
        )
    return replace(settings, threads=threads, products="torch")
