"""Which mapped weights are in memory: the next ones fetched, those behind released.

A pass reads the weights in pieces: block 0, 1, ... L-1, then the head in parts, then (backward) the
blocks again from L-1 to 0. With a limit, what is in memory is

    pinned pieces  +  the piece in use  +  the next one that is not there,

and the rest is unmapped as soon as the pass has moved on. A pass reads each piece once, so of N
bytes it finds at most what is resident when it begins, C: any policy reads N - C or more. Pinning
reaches that bound in both directions of travel, where keeping what was used last reaches it only
when the pass turns around (training) and finds nothing when it starts over (evaluation). Blocks are
pinned before parts of the head, since training reads them twice, and spread evenly, so that the
disk has the time of several blocks' products for each block that it reads.

Nobody says which way a pass goes. `use` sees what is read, remembers what came after it the last
time, and fetches that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .mapping import Span, file_spans
from .matrix import StoredMatrix

_GOLDEN = 0.6180339887498949


class Residency:
    """Keeps pieces of mapped weights within a limit. Not for several threads at once."""

    def __init__(
        self,
        pieces: Sequence[Sequence[Span]],
        num_blocks: int,
        limit: Callable[[], int],
        *,
        from_cache: bool,
    ) -> None:
        """Nothing is fetched yet; what is mapped of the pieces is released.

        Args:
            pieces: the pages of each block, in order, then of each part of the head.
            num_blocks: how many of the pieces are blocks.
            limit: bytes of pieces that may be resident, asked whenever a pass begins or ends; at
                least `smallest_limit` is taken.
            from_cache: also drop released pages from the page cache, where that counts as memory.
        """
        self.pieces = pieces
        self.nbytes = [sum(span.nbytes for span in piece) for piece in pieces]
        self._num_blocks = num_blocks
        self._limit = limit
        self._from_cache = from_cache
        self._order = _spread(range(num_blocks)) + _spread(range(num_blocks, len(pieces)))
        self._pinned: set[int] = set()
        self._resident: set[int] = set()
        self._before = self._at = -1
        self._after: dict[tuple[int, int], int] = {}
        for number, piece in enumerate(pieces):
            self._release(number)
            for span in piece:
                span.read_only_what_is_asked()

    @property
    def smallest_limit(self) -> int:
        """Bytes without which nothing can be fetched ahead: the two largest pieces."""
        return sum(sorted(self.nbytes)[-2:])

    @property
    def resident_bytes(self) -> int:
        """Bytes of the pieces that are, or are being, fetched."""
        return sum(self.nbytes[number] for number in self._resident)

    def use(self, piece: int) -> None:
        """Say that a piece is about to be read.

        Args:
            piece: its number; calling again for the same one costs nothing.
        """
        if piece == self._at:
            return
        self._after[self._before, self._at] = piece
        self._before, self._at = self._at, piece
        if piece == 0 or not self._resident:
            self._plan()
        wanted = {piece, self._ahead()}
        keep = self._pinned | wanted
        for number in self._resident - keep:
            self._release(number)
        self._resident &= keep
        for number in sorted(wanted, key=lambda number: number != piece):
            # Asked again of the piece in use: where memory was short, some of it was not read.
            self._resident.add(number)
            for span in self.pieces[number]:
                span.will_need()

    def forget_lookups(self, pieces: Sequence[int], spans: Sequence[Span]) -> None:
        """Release the single rows that were looked up in a table.

        Args:
            pieces: the table's, where it is swept too; none otherwise.
            spans: the table's pages, released whole where it is never swept.
        """
        for number in pieces:
            if number not in self._resident:
                self._release(number)
        if not pieces:
            self._release_spans(spans)

    def _plan(self) -> None:
        """Choose what to pin within the limit of now."""
        limit = max(self._limit(), self.smallest_limit)
        if sum(self.nbytes) <= limit:
            self._pinned = set(self._order)
            return
        left = limit - self.smallest_limit
        self._pinned = set()
        for number in self._order:
            left -= self.nbytes[number]
            if left < 0:
                return
            self._pinned.add(number)

    def _ahead(self) -> int:
        """The next piece of the pass that is not in memory for good; this one if there is none."""
        before, at = self._before, self._at
        for _ in self.pieces:
            before, at = at, self._after.get((before, at), self._onwards(before, at))
            if at not in self._pinned or at not in self._resident:
                return at
        return self._at

    def _onwards(self, before: int, at: int) -> int:
        """What follows, by a guess: go on the same way; from the head's end the last block."""
        last = len(self.pieces) - 1
        if at == last:
            return self._num_blocks - 1
        return at + 1 if at >= before or at == 0 else at - 1

    def _release(self, number: int) -> None:
        self._release_spans(self.pieces[number])

    def _release_spans(self, spans: Sequence[Span]) -> None:
        for span in spans:
            span.release(from_cache=self._from_cache)


def _spread(numbers: range) -> list[int]:
    """The numbers in an order whose every beginning is spread evenly, from the middle one.

    Steps of the golden ratio: the first k points have gaps of at most three sizes.
    """
    middle = len(numbers) // 2
    return sorted(numbers, key=lambda n: ((n - numbers.start - middle) * _GOLDEN) % 1.0)


@dataclass(frozen=True)
class _BlockWatch:
    """Of a block's matrix: the whole block is one piece."""

    residency: Residency
    piece: int
    max_rows: int

    def reading(self, start: int) -> None:
        self.residency.use(self.piece)

    def looked_up(self) -> None:
        """A block's matrices are only swept."""


@dataclass(frozen=True)
class _TableWatch:
    """Of the embedding or the head: `max_rows` rows a piece, from piece `first`."""

    residency: Residency
    pieces: range
    spans: list[Span]
    max_rows: int

    def reading(self, start: int) -> None:
        if self.pieces:
            self.residency.use(self.pieces[start // self.max_rows])

    def looked_up(self) -> None:
        self.residency.forget_lookups(self.pieces, self.spans)


def watch_matrices(
    blocks: Sequence[Sequence[StoredMatrix]],
    head: StoredMatrix,
    embedding: StoredMatrix,
    limit: Callable[[], int],
    *,
    from_cache: bool,
) -> Residency | None:
    """Keep a model's matrices within a limit from now on.

    Args:
        blocks: the matrices of each block, in order.
        head: the output head; swept in parts of about a block's size.
        embedding: the same matrix as the head, or one that is only looked up.
        limit: see `Residency`.
        from_cache: see `Residency`.

    Returns:
        What keeps them, or None where the system does not tell where files are mapped.
    """
    stored = [[part for matrix in block for part in _all(matrix)] for block in blocks]
    rows = _rows_per_part(head, max(sum(map(_nbytes, block)) for block in stored))
    parts = [head.stored(start, start + rows) for start in range(0, head.shape[0], rows)]
    pieces = [file_spans(tensors) for tensors in [*stored, *parts]]
    tables = [file_spans(_all(matrix)) for matrix in (head, embedding)]
    located = [piece for piece in pieces if piece is not None]
    spans = [table for table in tables if table is not None]
    if len(located) < len(pieces) or len(spans) < len(tables):
        return None
    residency = Residency(located, len(blocks), limit, from_cache=from_cache)
    for number, block in enumerate(blocks):
        for matrix in block:
            matrix.watch = _BlockWatch(residency, number, matrix.shape[0])
    swept = range(len(blocks), len(pieces))
    tied = spans[0] == spans[1]
    head.watch = _TableWatch(residency, swept, spans[0], rows)
    embedding.watch = _TableWatch(residency, swept if tied else range(0), spans[1], rows)
    for span in spans[1]:
        span.read_only_what_is_asked()
    return residency


def _all(matrix: StoredMatrix) -> list[Tensor]:
    return matrix.stored(0, matrix.shape[0])


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _rows_per_part(head: StoredMatrix, block_bytes: int) -> int:
    """Rows of the head in nearly equal parts of at most `block_bytes`."""
    parts = -(-sum(map(_nbytes, _all(head))) // block_bytes)
    return -(-head.shape[0] // parts)
