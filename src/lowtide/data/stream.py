"""The tokens of a text that is too long to be held, as if it had been tokenised in one piece.

A tokenizer looks beyond the token at hand: pre-tokenisers match words, BPE merges within them, and
some join over the whole text. So segments overlap, and one hands over to the next at a place where
both agree: the same tokens at the same characters, for `_AGREE` characters to either side, far from
both their ends. Where there is no such place, the two segments are tokenised as one.

    text      ....................................................................
    segment   [------------------------------|--------)
    next                            (--------|------------------------------------]
                                    context  handed over here
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lowtide.data.tokenizer import Tokenizer

_SEGMENT = 1 << 18
_CONTEXT = 1 << 12
_AGREE = 1 << 9


class _Segment(NamedTuple):
    """A tokenised part of the text: ids, and where each starts and ends in the whole text."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


def stream_ids(tokenizer: Tokenizer, pieces: Iterable[str]) -> Iterator[list[int]]:
    """Tokenise a text as `Tokenizer.encode_document` does, in bounded memory.

    Args:
        tokenizer: The tokenizer.
        pieces: The text, in order.

    Yields:
        Its ids, in order, as they become certain.
    """
    source = iter(pieces)
    text, start = _take(source, "", _SEGMENT), 0
    segment, done = _encoded(tokenizer, text, start), 0
    while True:
        more = _take(source, "", _SEGMENT)
        if not more:
            yield segment.ids[done:]
            return
        # From where a token starts, so that runs of one letter are cut alike on both sides.
        context = bisect_left(segment.starts, start + len(text) - 2 * _CONTEXT, lo=done)
        at = segment.starts[context] if context < len(segment.starts) else start
        joined = text[at - start :] + more
        following = _encoded(tokenizer, joined, at)
        place = _agreement(segment, following, start + len(text) - _CONTEXT)
        if place is None:
            text += more
            segment = _encoded(tokenizer, text, start)
            continue
        here, there = place
        yield segment.ids[done:here]
        segment, done, text, start = following, there, joined, at


def _take(source: Iterator[str], text: str, size: int) -> str:
    """`text` with pieces added until it has `size` characters, or the pieces end."""
    parts, length = [text], len(text)
    while length < size and (piece := next(source, "")):
        parts.append(piece)
        length += len(piece)
    return "".join(parts)


def _encoded(tokenizer: Tokenizer, text: str, start: int) -> _Segment:
    ids, offsets = tokenizer.encode_document(text)
    starts, ends, last = [], [], 0
    for first, end in offsets:
        # Added tokens have the span (0, 0), also at the end: keep the order that bisect needs.
        last = max(last, first)
        starts.append(start + last)
        ends.append(start + max(last, end))
    return _Segment(ids, starts, ends)


def _agreement(one: _Segment, other: _Segment, middle: int) -> tuple[int, int] | None:
    """The tokens, one of each segment, that start at `middle` or near it, where both agree."""
    low, high = middle - _AGREE, middle + _AGREE
    i, j = bisect_left(one.starts, low), bisect_left(other.starts, low)
    end_i, end_j = bisect_left(one.starts, high), bisect_left(other.starts, high)
    same = (
        one.ids[i:end_i] == other.ids[j:end_j]
        and one.starts[i:end_i] == other.starts[j:end_j]
        and one.ends[i:end_i] == other.ends[j:end_j]
    )
    if not same or i == end_i:
        return None
    half = (end_i - i) // 2
    return i + half, j + half
