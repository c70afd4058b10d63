"""What a process's memory is, measured.

`anon` is RssAnon: private dirty memory, which only swap could take back. Mapped weight pages are
not in it. `peak_anon_bytes` is its peak while watched, above what it was right after
`import lowtide`.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_STATM = Path("/proc/self/statm")
_PAGE = os.sysconf("SC_PAGE_SIZE")
POLL_S = 0.001


@dataclass(frozen=True)
class MemoryReading:
    """Bytes of this process: anonymous, and resident in all (mapped files included)."""

    anon_bytes: int
    rss_bytes: int


def read_memory() -> MemoryReading:
    """The process's memory now; zeros on systems without /proc."""
    try:
        return _parse(_STATM.read_bytes())
    except OSError:
        return MemoryReading(0, 0)


def _parse(statm: bytes) -> MemoryReading:
    """`resident` and `shared` (file and shmem pages) of /proc/self/statm, in pages."""
    _, resident, shared, *_ = statm.split()
    return MemoryReading((int(resident) - int(shared)) * _PAGE, int(resident) * _PAGE)


AT_IMPORT = read_memory()
"""Replaced by `lowtide/__init__.py` when the import is complete."""


def mark_import() -> None:
    """Take the reading that `peak_anon_bytes` is counted from."""
    global AT_IMPORT
    AT_IMPORT = read_memory()


class MemoryMeter:
    """Polls the process's memory from a thread, at least every 2 ms, and keeps the peaks.

    Use as a context manager around the steps. `take` returns the peaks since the last `take`.
    """

    def __init__(self) -> None:
        """Set up; polling starts on entering the context."""
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._anon = self._rss = 0
        self._thread = threading.Thread(target=self._poll, name="memory-meter", daemon=True)

    def __enter__(self) -> Self:
        """Start polling."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop polling."""
        self._stop.set()
        self._thread.join()

    def take(self) -> MemoryReading:
        """Peaks since the last call: anon above the import, and the whole process."""
        self._note(read_memory())
        with self._lock:
            peak = MemoryReading(max(0, self._anon - AT_IMPORT.anon_bytes), self._rss)
            self._anon = self._rss = 0
        return peak

    def _note(self, now: MemoryReading) -> None:
        with self._lock:
            self._anon = max(self._anon, now.anon_bytes)
            self._rss = max(self._rss, now.rss_bytes)

    def _poll(self) -> None:
        try:
            descriptor = os.open(_STATM, os.O_RDONLY)
        except OSError:
            return
        try:
            while not self._stop.wait(POLL_S):
                self._note(_parse(os.pread(descriptor, 128, 0)))
        finally:
            os.close(descriptor)
