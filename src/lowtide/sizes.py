"""Sizes in bytes, as users write them."""

from __future__ import annotations

import re

from lowtide.errors import ConfigError

_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)}


def size_in_bytes(name: str, value: int | str) -> int:
    """A size as a user writes it: `400MB` (10^6), `384MiB` (2^20), or bytes.

    Args:
        name: the setting, for the message.
        value: text or a number of bytes.

    Returns:
        Bytes, at least 1.

    Raises:
        ConfigError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    unit = _UNITS.get(found[2].upper()) if found else None
    size = int(float(found[1]) * unit) if found and unit else 0
    if size < 1 or isinstance(value, bool):
        raise ConfigError(
            f"{name} is {value!r}; expected a size such as 400MB, 384MiB or a number of bytes."
        )
    return size
