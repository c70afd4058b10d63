"""The first records as training would see them: text in runs that are trained on or masked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from lowtide.data.decoding import StreamDecoder
from lowtide.data.encode import Encoded, Encoder
from lowtide.data.files import require_split
from lowtide.data.formats import iter_records
from lowtide.data.prepare import PrepareRequest
from lowtide.data.text import iter_plain
from lowtide.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Shown:
    """One record as training sees it.

    Attributes:
        ids: Its tokens, cut to length.
        trained: 1 for each that is a label.
        dropped_tokens: How many were cut off.
        runs: Its text, in pieces of (trained, text) that alternate.
    """

    ids: list[int]
    trained: list[int]
    dropped_tokens: int
    runs: list[tuple[bool, str]]


def answer(request: str) -> str:
    """The JSON answer to a JSON request.

    Args:
        request: what `PrepareRequest.to_json` wrote.

    Returns:
        {"records": [...]}, each a `Shown`.
    """
    return json.dumps({"records": sample(PrepareRequest.from_json(request))})


def sample(request: PrepareRequest) -> list[dict[str, Any]]:
    """Tokenise the first records that can be trained on, and keep nothing.

    Args:
        request: Of which data, how, and how many records.

    Returns:
        `Shown` records as JSON can hold them.

    Raises:
        DataError: A record among them cannot be used, or there is none.
    """
    source = require_split(request.data, ("train",))
    tokenizer = Tokenizer.load(request.tokenizer, request.chat_template)
    encoder = Encoder(tokenizer, request.max_seq_length, request.vocab_size, request.mask_prompt)
    if source.suffix.lower() == ".txt":
        encoded = encoder.windows(iter_plain(source), source)
    else:
        encoded = encoder.encode_all(iter_records(source, request.features))
    usable = (one for one in encoded if one.trained_tokens)
    return [asdict(_shown(tokenizer, one)) for one in islice(usable, request.sampled)]


def _shown(tokenizer: Tokenizer, one: Encoded) -> Shown:
    decoder = StreamDecoder(tokenizer, skip_special_tokens=False)
    runs: list[tuple[bool, str]] = []
    flags = [False, *map(bool, one.trained[1:])]  # the first token is never predicted
    pieces = [*zip(flags, map(decoder.push, one.ids), strict=True)]
    if pieces:
        pieces.append((flags[-1], decoder.finish()))
    for trained, text in pieces:
        if runs and runs[-1][0] == trained:
            runs[-1] = (trained, runs[-1][1] + text)
        else:
            runs.append((trained, text))
    return Shown(one.ids, one.trained, one.dropped_tokens, runs)
