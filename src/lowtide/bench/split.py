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
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

import lowtide
from lowtide.errors import ConfigError
from lowtide.memory.plan import PLANNED

PARTS = ("products", "widening", "attention", "elementwise", "loss")
_PACKAGE = str(Path(lowtide.__file__).parent)
_WHERE = {
    f"{_PACKAGE}/ops/cross_entropy.py": "loss",
    f"{_PACKAGE}/ops/attention.py": "attention",
    f"{_PACKAGE}/ops/fused_attention.py": "attention",
    f"{_PACKAGE}/weights/matrix.py": "widening",
    f"{_PACKAGE}/weights/storages": "widening",
}


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

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        part = _part(str(func))
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self.seconds[part] += time.perf_counter() - start
        return result


def _part(operation: str) -> str:
    """By the innermost of our files that says more than the operation's name does."""
    frame = sys._getframe(2)
    found = None
    while frame is not None:
        name = frame.f_code.co_filename
        where = _WHERE.get(name) or _WHERE.get(name.rpartition("/")[0])
        if where in ("loss", "attention"):
            return where
        found = found or where
        frame = frame.f_back  # type: ignore[assignment]
    return found or ("products" if "mm" in operation else "elementwise")
