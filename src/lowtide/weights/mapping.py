"""Where tensors lie in mapped files, and what the kernel is told about those pages.

Linux only: places come from /proc/self/maps, advice goes through madvise(2) and posix_fadvise(2).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

_MAPS = Path("/proc/self/maps")
_PAGE = mmap.PAGESIZE
_READ_BYTES = 128 * 1024  # Linux's default readahead, so that any device takes it whole


@dataclass(frozen=True)
class Span:
    """Whole pages of a mapped file.

    Attributes:
        address: of the first byte, a multiple of the page size.
        nbytes: length, a multiple of the page size.
        path: the file.
        offset: of the first byte in the file.
    """

    address: int
    nbytes: int
    path: str
    offset: int

    def will_need(self) -> None:
        """Start reading the pages into the page cache; returns before they are there.

        In small parts: the kernel cuts what one call asks for to the device's readahead.
        """
        for start in range(0, self.nbytes, _READ_BYTES):
            length = min(_READ_BYTES, self.nbytes - start)
            _madvise(self.address + start, length, mmap.MADV_WILLNEED)

    def read_only_what_is_asked(self) -> None:
        """No readahead at page faults: what `will_need` names is read, and single pages."""
        self._advise(mmap.MADV_RANDOM)

    def release(self, *, from_cache: bool) -> None:
        """Unmap the pages from this process; they come back when they are touched.

        Args:
            from_cache: also drop them from the page cache, where no other process maps them.
        """
        self._advise(mmap.MADV_DONTNEED)
        if from_cache:
            # Opened for the moment: a file replaced under this name is another file, whose pages
            # may be dropped too, and a descriptor kept open would be one per shard.
            try:
                descriptor = os.open(self.path, os.O_RDONLY)
            except OSError:
                return  # gone: the kernel drops the mapped file's pages when it has to
            try:
                os.posix_fadvise(descriptor, self.offset, self.nbytes, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    def _advise(self, advice: int) -> None:
        """Advice may be refused (an old kernel, a locked page); nothing depends on its success."""
        _madvise(self.address, self.nbytes, advice)


class FileArea(NamedTuple):
    """A line of /proc/self/maps that shows a file."""

    start: int
    stop: int
    offset: int
    path: str


def file_spans(tensors: Iterable[Tensor]) -> list[Span] | None:
    """The pages of mapped files that hold the tensors, merged where they touch.

    Args:
        tensors: contiguous tensors.

    Returns:
        Spans in order of their addresses, rounded outwards to whole pages, or None where a tensor
        is not on a mapped file or the system does not tell (no /proc).
    """
    areas = file_areas()
    spans: list[Span] = []
    for tensor in sorted(tensors, key=Tensor.data_ptr):
        start = tensor.data_ptr() // _PAGE * _PAGE
        stop = -(-(tensor.data_ptr() + tensor.numel() * tensor.element_size()) // _PAGE) * _PAGE
        area = next((a for a in areas if a.start <= start and stop <= a.stop), None)
        if area is None:
            return None
        span = Span(start, stop - start, area.path, start - area.start + area.offset)
        if spans and start <= spans[-1].address + spans[-1].nbytes:
            first = spans.pop()
            span = Span(first.address, stop - first.address, first.path, first.offset)
        spans.append(span)
    return spans


def file_areas() -> list[FileArea]:
    """The mapped files of this process; none where the system does not tell."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    areas = []
    for line in lines:
        addresses, _, offset, _, inode, *path = line.split(maxsplit=5)
        if inode != "0" and path:
            start, stop = (int(part, 16) for part in addresses.split("-"))
            areas.append(FileArea(start, stop, int(offset, 16), path[0]))
    return areas


def untouched_bytes(address: int, nbytes: int) -> int:
    """Bytes of private memory that nothing has written or read yet, so that no page backs them.

    Args:
        address: of the first byte.
        nbytes: length.

    Returns:
        Those of whole pages; 0 where the system does not tell (mincore(2)).
    """
    start, stop = -(-address // _PAGE) * _PAGE, (address + nbytes) // _PAGE * _PAGE
    if stop <= start:
        return 0
    backed = (ctypes.c_ubyte * ((stop - start) // _PAGE))()
    if ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), backed):
        return 0
    return _PAGE * sum(not page & 1 for page in backed)


def _load_madvise() -> ctypes._CFuncPtr:  # type: ignore[name-defined]  # its name is private
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_madvise = _load_madvise()
