"""Where a step's time goes: products, widening, attention, elementwise, loss.

Every torch operation of one step is timed and put where the code that called it says: the loss's
sweep and attention are wholes, their products and widening included; of the rest, tiles read from
the weights are widening, matrix products are products, all else is elementwise. What Python takes
between the operations is in none of them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from lowtide.errors import ConfigError
from lowtide.memory.kinds import Place, Stack
from lowtide.memory.plan import PLANNED

PARTS = ("products", "widening", "attention", "elementwise", "loss")
_WHOLES = {
    "ops.cross_entropy": "loss",
    "ops.attention": "attention",
    "ops.fused_attention": "attention",
}
_TILES = ("weights.matrix", "weights.storages.")


def check_split(method: str) -> None:
    """Refuse a method whose operations autograd calls: they cannot be told apart.

    Args:
        method: its name.

    Raises:
        ConfigError: names the methods that can be split.
    """
    if method not in PLANNED:
        raise ConfigError(
            f"--time-split cannot tell apart what autograd calls in --method {method}. "
            f"Use one of {', '.join(PLANNED)}, or leave it out."
        )


def time_split(step: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one step by PARTS.

    Args:
        step: makes it. It takes longer than usual: to time an operation costs some 10 us, which
            are in no part.

    Returns:
        Seconds by part.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    with _Timed(seconds):
        step()
    return seconds


class _Timed(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's class is not typed
    """Times each operation."""

    def __init__(self, seconds: dict[str, float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.seconds = seconds
        self._stack = Stack()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        part = _part(self._stack.places(sys._getframe(1)), str(func))
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self.seconds[part] += time.perf_counter() - start
        return result


def _part(places: list[Place], operation: str) -> str:
    """Which of PARTS an operation belongs to, called from these places, innermost first."""
    whole = next((_WHOLES[place.module] for place in places if place.module in _WHOLES), None)
    if whole is not None:
        return whole
    if any(place.module.startswith(_TILES) for place in places):
        return "widening"
    product = "mm" in operation or any(place.module == "ops.products" for place in places)
    return "products" if product else "elementwise"
