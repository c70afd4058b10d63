"""What malloc keeps, made the same in every run."""

from __future__ import annotations

import contextlib
import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MAPPED_BYTES, _KEPT_BYTES = 1 << 20, 1 << 21


def fix_thresholds() -> None:
    """From 1 MiB on, what is freed goes back to the system at once (glibc).

    By itself glibc raises that size, up to 32 MiB, to that of the largest piece ever freed: whether
    a temporary of 12 MB leaves a hole of its size in the heap then depends on what came before it.
    Left alone where the user has set MALLOC_* or GLIBC_TUNABLES.
    """
    chosen = any(n.startswith("MALLOC_") or n == "GLIBC_TUNABLES" for n in os.environ)
    if chosen:
        return
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
