"""What the child process of `lowtide.data.prepare` does: tokenise a data set into caches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from lowtide.data.cache import CacheWriter
from lowtide.data.encode import Encoded, Encoder
from lowtide.data.files import read_text, require_split, resolve_split
from lowtide.data.formats import FeatureNames, iter_records
from lowtide.data.prepare import PrepareReport, PrepareRequest, SplitReport, cache_path
from lowtide.data.tokenizer import Tokenizer
from lowtide.errors import ConfigError, DataError


def run(request: PrepareRequest) -> PrepareReport:
    """Tokenise what a request asks for, in this process.

    Args:
        request: What to prepare.

    Returns:
        The caches and what is in them. Either all of them are written, or none is.

    Raises:
        DataError: A file or record cannot be used, or nothing is left to train on.
        ModelError: There is no usable tokenizer.
        ConfigError: A setting does not fit the data.
        OutputError: The caches cannot be written.
    """
    sources = _sources(request)
    tokenizer = Tokenizer.load(request.tokenizer, request.chat_template)
    encoder = Encoder(tokenizer, request.max_seq_length, request.vocab_size, request.mask_prompt)
    hold_out = request.valid_records if set(sources) == {"train"} else 0
    with ExitStack() as stack:
        names = [*sources, "valid"] if hold_out else list(sources)
        splits = {
            name: _Split(cache_path(request.out, name), sources.get(name, sources[names[0]]))
            for name in names
        }
        for split in splits.values():
            stack.enter_context(split.writer)
        for name, source in sources.items():
            held = _fill(splits[name], _encoded(encoder, source, request.features), hold_out)
            splits[name].check(encoder, hold_out)
            for sequence in held:
                splits["valid"].add(sequence)
        for split in splits.values():
            split.writer.commit()
    mismatch = tokenizer.mismatch(request.vocab_size)
    return PrepareReport(
        {name: split.report() for name, split in splits.items()},
        () if mismatch is None else (mismatch,),
    )


def _sources(request: PrepareRequest) -> dict[str, Path]:
    """The file of each split to prepare."""
    if request.valid_records < 0:
        raise ConfigError(f"valid_records is {request.valid_records}; expected 0 or more.")
    if request.split == "eval":
        return {"eval": require_split(request.data, ("test", "valid"))}
    sources = {"train": require_split(request.data, ("train",))}
    if request.valid_data is not None:
        sources["valid"] = require_split(request.valid_data, ("valid",))
    elif request.data.is_dir() and (valid := resolve_split(request.data, "valid")) is not None:
        sources["valid"] = valid
    return sources


def _encoded(encoder: Encoder, source: Path, features: FeatureNames) -> Iterator[Encoded]:
    if source.suffix.lower() == ".txt":
        return encoder.windows(read_text(source), source)
    return (encoder.encode(record) for record in iter_records(source, features))


def _fill(split: _Split, sequences: Iterator[Encoded], hold_out: int) -> deque[Encoded]:
    """Write all sequences but the last `hold_out` that can be trained on; returns those."""
    held: deque[Encoded] = deque()
    for sequence in sequences:
        if sequence.trained_tokens == 0:
            split.drop(sequence)
            continue
        held.append(sequence)
        if len(held) > hold_out:
            split.add(held.popleft())
    return held


class _Split:
    """One cache being written, and its counts."""

    def __init__(self, path: Path, source: Path) -> None:
        self.path = path
        self.source = source
        self.writer = CacheWriter(path)
        self.records = self.tokens = self.trained_tokens = self.longest = 0
        self.truncated_records = self.dropped_tokens = self.dropped_records = 0

    def add(self, sequence: Encoded) -> None:
        self.writer.append(sequence.ids, sequence.trained, sequence.digest)
        self.records += 1
        self.tokens += len(sequence.ids)
        self.trained_tokens += sequence.trained_tokens
        self.longest = max(self.longest, len(sequence.ids))
        self.truncated_records += sequence.dropped_tokens > 0
        self.dropped_tokens += sequence.dropped_tokens

    def drop(self, sequence: Encoded) -> None:
        self.dropped_records += 1
        self.dropped_tokens += len(sequence.ids) + sequence.dropped_tokens

    def check(self, encoder: Encoder, hold_out: int) -> None:
        """There must be something left to train on."""
        if self.records:
            return
        if hold_out:
            raise DataError(
                f"{self.source} has too few records to hold out {hold_out} for validation and "
                "train on the rest. Lower valid_records, or add data."
            )
        raise DataError(
            f"{self.source} leaves nothing to train on: in all {self.dropped_records} records, "
            f"no token that is a label comes within the first {encoder.max_seq_length}. Raise "
            "--max-seq-length"
            + (", or train without --mask-prompt." if encoder.mask_prompt else ".")
        )

    def report(self) -> SplitReport:
        return SplitReport(
            path=self.path,
            source=self.source,
            records=self.records,
            tokens=self.tokens,
            trained_tokens=self.trained_tokens,
            longest=self.longest,
            truncated_records=self.truncated_records,
            dropped_tokens=self.dropped_tokens,
            dropped_records=self.dropped_records,
        )


def answer(request: str) -> str:
    """The JSON answer to a JSON request.

    Args:
        request: what `PrepareRequest.to_json` wrote.

    Returns:
        What `PrepareReport.from_dict` reads.
    """
    return run(PrepareRequest.from_json(request)).to_json()
