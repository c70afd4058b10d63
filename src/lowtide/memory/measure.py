"""What a process's memory is, measured.

`anon` is RssAnon: private dirty memory, which only swap could take back. Mapped weight pages are
not in it. `peak_anon_bytes` is its peak while watched, above what it was right after
`import lowtide`.

Two instruments watch together. A thread polls /proc/self/statm, and a thread can starve: behind
code that holds the interpreter's lock, behind a busy neighbour, behind a host that takes the core
away (gaps of 60 ms were seen). The kernel itself keeps a mark of the highest resident memory
(VmHWM), which no spike escapes however short. It counts mapped pages too, so

    peak anon >= VmHWM - the most mapped pages seen,

with equality while the mapped pages do not change, as in any step after the weights have been read
once. Where that bound is above what polling saw, polling missed a spike, and the bound is reported.
The mark is set back at each `take`, by which the ru_maxrss that others see of this process
(getrusage, /usr/bin/time) becomes its peak since then. Without /proc/self/clear_refs it is not set
back, and tells only of spikes above all earlier ones.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")
_IO = Path("/proc/self/io")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_MARK = b"5"  # proc(5): set VmHWM back to the resident memory of now
_PAGE = os.sysconf("SC_PAGE_SIZE")
POLL_S = 0.002
_RESTING_S = 0.2
_SWITCH_S = 0.0005
# The kernel counts pages per core and adds them up now and then, so the mark is blurred by as much.
_BLUR_BYTES = 1_000_000


@dataclass(frozen=True)
class MemoryReading:
    """Bytes of this process: anonymous, resident in all, and of mapped files among those."""

    anon_bytes: int
    rss_bytes: int
    file_bytes: int = 0


def read_memory() -> MemoryReading:
    """The process's memory now; zeros on systems without /proc."""
    try:
        return _parse(_STATM.read_bytes())
    except OSError:
        return MemoryReading(0, 0)


def _parse(statm: bytes) -> MemoryReading:
    """`resident` and `shared` (file and shmem pages) of /proc/self/statm, in pages."""
    _, resident, shared, *_ = statm.split()
    file = int(shared) * _PAGE
    return MemoryReading(int(resident) * _PAGE - file, int(resident) * _PAGE, file)


AT_IMPORT = read_memory()
"""Replaced by `lowtide/__init__.py` when the import is complete."""


def read_from_disk() -> int:
    """Bytes that this process has had read from a disk so far; 0 where the system does not say."""
    try:
        found = re.search(rb"^read_bytes: (\d+)", _IO.read_bytes(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def mark_import() -> None:
    """Take the reading that `peak_anon_bytes` is counted from."""
    global AT_IMPORT
    AT_IMPORT = read_memory()


class _HighMark:
    """VmHWM: the kernel's own mark of the highest resident memory, since the last `take`."""

    def __init__(self) -> None:
        self._before = 0

    def take(self) -> int:
        """The mark, or 0 where it says nothing of the time since the last call."""
        try:
            found = re.search(rb"VmHWM:\s+(\d+) kB", _STATUS.read_bytes())
        except OSError:
            return 0
        mark = 1024 * int(found[1]) if found else 0
        since = mark if mark > self._before else 0
        try:
            _CLEAR.write_bytes(_RESET_MARK)
            self._before = 0
        except OSError:
            self._before = mark
        return since


class MemoryMeter:
    """Keeps the peaks of the process's memory: polled every 2 ms, and the kernel's mark.

    Use as a context manager around the steps. `take` returns the peaks since the last `take`.
    While it runs, the interpreter's switch interval is short enough for the polling thread to get
    its turn from code that never lets go of the lock by itself.
    """

    def __init__(self) -> None:
        """Set up; polling starts on entering the context."""
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._anon = self._rss = self._mapped = 0
        self._mark = _HighMark()
        self._switch_s = sys.getswitchinterval()
        self._pause_s = POLL_S
        self._thread = threading.Thread(target=self._poll, name="memory-meter", daemon=True)

    def __enter__(self) -> Self:
        """Start polling."""
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(min(self._switch_s, _SWITCH_S))
        self._mark.take()
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
        sys.setswitchinterval(self._switch_s)

    def rest(self, resting: bool) -> None:
        """Poll rarely while nothing happens, so that a pause costs nothing.

        Args:
            resting: False goes back to the usual pace, at the next poll.
        """
        self._pause_s = _RESTING_S if resting else POLL_S

    def take(self) -> MemoryReading:
        """Peaks since the last call: anon above the import, the whole process, mapped files."""
        self._note(read_memory())
        mark = self._mark.take()
        now = read_memory()  # what the next interval begins with
        with self._lock:
            anon, rss, mapped = self._anon, self._rss, self._mapped
            self._anon, self._rss = now.anon_bytes, now.rss_bytes
            self._mapped = now.file_bytes
        if mark - mapped > anon + _BLUR_BYTES:
            anon = mark - mapped
        return MemoryReading(max(0, anon - AT_IMPORT.anon_bytes), max(rss, mark), mapped)

    def _note(self, now: MemoryReading) -> None:
        with self._lock:
            self._anon = max(self._anon, now.anon_bytes)
            self._rss = max(self._rss, now.rss_bytes)
            self._mapped = max(self._mapped, now.file_bytes)

    def _poll(self) -> None:
        try:
            descriptor = os.open(_STATM, os.O_RDONLY)
        except OSError:
            return
        try:
            while not self._stop.wait(self._pause_s):
                self._note(_parse(os.pread(descriptor, 128, 0)))
        finally:
            os.close(descriptor)
