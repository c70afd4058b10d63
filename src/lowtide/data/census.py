"""What is in a data set, for people: counted in one pass, in bounded memory, and nothing is kept.

It runs in a child of its own (`lowtide.data.child`). Lengths are counted, not listed, and
duplicates found by digests in an unnamed file (`lowtide.data.overlap`).
"""

from __future__ import annotations

import json
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from lowtide.data.encode import Encoded, Encoder
from lowtide.data.files import MAX_PROBLEMS, Tally, require_split, resolve_split
from lowtide.data.formats import FeatureNames, iter_records
from lowtide.data.overlap import Digests, repeated, shared
from lowtide.data.prepare import PrepareRequest
from lowtide.data.text import EmptyDataError, iter_plain
from lowtide.data.tokenizer import Tokenizer
from lowtide.errors import DataError

_FLUSH = 1 << 16
_REMEMBERED = 100_000
_SPLITS = ("train", "valid", "test")


@dataclass
class SplitCheck:
    """What was found in one file.

    Attributes:
        source: The file.
        records: Usable records (.txt: windows).
        tokens: In them, before any is cut.
        kept_tokens: What training reads of them.
        trained_tokens: What its loss counts.
        over_long: Records that are cut.
        over_long_examples: Where the first of them are, and their tokens.
        untrained: Records left out because no trained token is left in them.
        duplicates: Records that are equal to an earlier one.
        duplicate_examples: The first of them, among the first 100,000 records.
        problems: Unusable records, by what is wrong with them.
        examples: The first of each.
        lengths: How many records have how many tokens, before any is cut.
        kept_lengths: The same as training reads them.
        unreadable: Why the file could not be read to its end, if so.
    """

    source: str
    records: int = 0
    tokens: int = 0
    kept_tokens: int = 0
    trained_tokens: int = 0
    over_long: int = 0
    over_long_examples: list[str] = field(default_factory=list)
    untrained: int = 0
    duplicates: int = 0
    duplicate_examples: list[str] = field(default_factory=list)
    problems: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    kept_lengths: dict[int, int] = field(default_factory=dict)
    unreadable: str | None = None

    @property
    def usable(self) -> bool:
        """Whether training would take the file."""
        return not self.problems and self.unreadable is None and self.records > self.untrained


@dataclass
class DataCheck:
    """What was found in a data set.

    Attributes:
        splits: By name; of a single file, "train".
        shared: Validation and test records that are trained on too, by split.
        warnings: What works, but may not be meant.
    """

    splits: dict[str, SplitCheck]
    shared: dict[str, int]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataCheck:
        """Read back what `to_dict` made and JSON carried."""
        splits = {}
        for name, one in values["splits"].items():
            for counts in ("lengths", "kept_lengths"):
                one[counts] = {int(length): count for length, count in one[counts].items()}
            splits[name] = SplitCheck(**one)
        return cls(splits, values["shared"], values["warnings"])


def census(request: PrepareRequest) -> DataCheck:
    """Look at every record of a data set.

    Args:
        request: Which, and how it would be tokenised.

    Returns:
        What was found.

    Raises:
        DataError: There is no file to look at.
        ModelError: There is no usable tokenizer.
        ConfigError: A setting does not fit the data.
    """
    sources = _sources(request)
    tokenizer = Tokenizer.load(request.tokenizer, request.chat_template)
    encoder = Encoder(tokenizer, request.max_seq_length, request.vocab_size, request.mask_prompt)
    mismatch = tokenizer.mismatch(request.vocab_size)
    splits, digests = {}, {}
    for name, source in sources.items():
        found = _Found(source, request.lengths if name == "train" else None)
        found.read(encoder, request.features)
        splits[name], digests[name] = found.check, found.digests()
    overlaps = {
        name: shared(digests["train"], digests[name])
        for name in sources
        if name != "train" and "train" in sources
    }
    return DataCheck(splits, overlaps, [] if mismatch is None else [mismatch])


def answer(request: str) -> str:
    """The JSON answer to a JSON request.

    Args:
        request: what `PrepareRequest.to_json` wrote.

    Returns:
        What `DataCheck.from_dict` reads.
    """
    return json.dumps(census(PrepareRequest.from_json(request)).to_dict())


def _sources(request: PrepareRequest) -> dict[str, Path]:
    if not request.data.is_dir():
        return {"train": require_split(request.data, ("train",))}
    found = {name: resolve_split(request.data, name) for name in _SPLITS}
    sources = {name: path for name, path in found.items() if path is not None}
    return sources or {"train": require_split(request.data, _SPLITS)}


class _Found:
    """One file being looked at."""

    def __init__(self, source: Path, lengths: Path | None) -> None:
        self._lengths_file = None if lengths is None else open(lengths, "wb")
        self.check = SplitCheck(str(source))
        self._source = source
        self._tally = Tally()
        self._file = TemporaryFile()
        self._buffer = array("Q")
        self._first: dict[int, str] = {}
        self._lengths: Counter[int] = Counter()
        self._kept: Counter[int] = Counter()

    def read(self, encoder: Encoder, features: FeatureNames) -> None:
        """Look at every record."""
        check = self.check
        try:
            for sequence in self._encoded(encoder, features):
                if sequence.ids:
                    self._add(sequence)
        except EmptyDataError as error:
            check.unreadable = str(error)
        except DataError as error:
            check.unreadable = str(error)
        if self._lengths_file is not None:
            self._lengths_file.close()
        check.problems, check.examples = dict(self._tally.counts), self._tally.examples
        check.lengths, check.kept_lengths = dict(self._lengths), dict(self._kept)
        check.duplicates = repeated(self.digests())

    def digests(self) -> Digests:
        """Those of all records so far, mapped."""
        self._buffer.tofile(self._file)
        del self._buffer[:]
        self._file.flush()
        if not self.check.records:
            return np.array([], dtype=np.uint64)
        return np.memmap(self._file, dtype=np.uint64, mode="r")

    def _encoded(self, encoder: Encoder, features: FeatureNames) -> Iterator[Encoded]:
        if self._source.suffix.lower() == ".txt":
            return encoder.windows(iter_plain(self._source), self._source)
        records = iter_records(self._source, features, self._tally)
        return encoder.encode_all(records, self._tally)

    def _add(self, sequence: Encoded) -> None:
        check, kept = self.check, len(sequence.ids)
        length = kept + sequence.dropped_tokens
        place = sequence.where.removeprefix(f"{self._source}, ") or f"window {check.records + 1}"
        check.records += 1
        check.tokens += length
        self._lengths[length] += 1
        if sequence.dropped_tokens:
            check.over_long += 1
            _note(check.over_long_examples, lambda: f"{place}: {length:,} tokens")
        if sequence.trained_tokens:
            check.kept_tokens += kept
            check.trained_tokens += sequence.trained_tokens
            self._kept[kept] += 1
            if self._lengths_file is not None:
                self._lengths_file.write(kept.to_bytes(4, sys.byteorder))
        else:
            check.untrained += 1
        before = self._first.get(sequence.digest)
        if before is not None:
            _note(check.duplicate_examples, lambda: f"{place} is the same as {before}")
        elif len(self._first) < _REMEMBERED:
            self._first[sequence.digest] = place
        self._buffer.append(sequence.digest)
        if len(self._buffer) >= _FLUSH:
            self.digests()


def _note(examples: list[str], text: Callable[[], str]) -> None:
    if len(examples) < MAX_PROBLEMS:
        examples.append(text())
