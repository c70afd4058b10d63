"""What the child process of `lowtide.data.prepare` does: tokenise a data set into caches."""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from lowtide.data.cache import CacheWriter, TokenDataset
from lowtide.data.encode import Encoded, Encoder
from lowtide.data.files import require_split, resolve_split
from lowtide.data.formats import iter_records
from lowtide.data.keys import source_parts, status_of, tokenizer_parts
from lowtide.data.overlap import overlap_warning
from lowtide.data.prepare import PrepareReport, PrepareRequest, SplitReport
from lowtide.data.store import TokenStore, key_of
from lowtide.data.text import EmptyDataError, iter_plain
from lowtide.data.tokenizer import Tokenizer
from lowtide.errors import ConfigError, DataError

_MAIN, _HELD = "tokens.safetensors", "held.safetensors"


def run(request: PrepareRequest) -> PrepareReport:
    """Find what a request asks for in the token store, or tokenise it, in this process.

    Args:
        request: What to prepare.

    Returns:
        The caches and what is in them.

    Raises:
        DataError: A file or record cannot be used, or nothing is left to train on.
        ModelError: There is no usable tokenizer.
        ConfigError: A setting does not fit the data.
        OutputError: The caches cannot be written.
    """
    sources = _sources(request)
    hold_out = request.valid_records if set(sources) == {"train"} else 0
    preparation = _Preparation(request)
    splits: dict[str, SplitReport] = {}
    warnings: list[str] = []
    for name in sorted(sources, reverse=True):  # validation data is smaller, and may be wrong
        try:
            caches, said = preparation.entry(sources[name], hold_out)
        except EmptyDataError as empty:
            if name != "valid":
                raise
            warnings.append(f"training goes on without validation: {empty}")
            continue
        splits[name] = caches[_MAIN]
        if _HELD in caches:
            splits["valid"] = caches[_HELD]
        warnings += [text for text in said if text not in warnings]
    if "valid" in splits and "train" in splits:
        datasets = (TokenDataset.open(splits[name].path) for name in ("train", "valid"))
        warnings += overlap_warning(*datasets)
    names = [name for name in ("train", "valid", "eval") if name in splits]
    return PrepareReport({name: splits[name] for name in names}, tuple(warnings), _peak_bytes())


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


class _Preparation:
    """A request, with what its splits share."""

    def __init__(self, request: PrepareRequest) -> None:
        self._request = request
        self._store = TokenStore(request.cache, request.builder)
        if request.max_seq_length < 2:
            raise ConfigError(
                f"max_seq_length is {request.max_seq_length}; expected at least 2, since each "
                "token is predicted from those before it."
            )

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self._request.tokenizer, self._request.chat_template)

    @cached_property
    def _encoder(self) -> Encoder:
        asked = self._request
        return Encoder(self._tokenizer, asked.max_seq_length, asked.vocab_size, asked.mask_prompt)

    @cached_property
    def _shared_parts(self) -> dict[str, Any]:
        asked = self._request
        return {
            **tokenizer_parts(asked.tokenizer, asked.chat_template),
            "max_seq_length": asked.max_seq_length,
            "vocab_size": asked.vocab_size,
            "mask_prompt": asked.mask_prompt,
            "features": asdict(asked.features),
        }

    def entry(self, source: Path, hold_out: int) -> tuple[dict[str, SplitReport], list[str]]:
        """The caches of a file, made where the store has none, and what was warned of."""
        status = status_of(source)
        parts = {**source_parts(source), **self._shared_parts, "hold_out": hold_out}
        key = key_of(parts)
        found, before = self._store.find(key), True
        if found is None:
            with self._store.locked(key):
                found = self._store.find(key)  # another process may have been at it
                if found is None:
                    self._build(key, source, hold_out, status)
                    found, before = self._store.find(key), False
        if found is None:
            raise DataError(
                f"{self._store.path(key)} was altered while it was written. See that nothing else "
                "writes there, or choose another directory with --cache-dir."
            )
        reports = {
            name: SplitReport(
                **about,
                path=self._store.path(key) / name,
                source=source,
                sha256=found["files"][name],
                from_store=before,
            )
            for name, about in found["caches"].items()
        }
        return reports, found["warnings"]

    def _build(self, key: str, source: Path, hold_out: int, status: tuple[int, int]) -> None:
        names = [_MAIN, _HELD] if hold_out else [_MAIN]
        with self._store.building(key) as directory, ExitStack() as stack:
            splits = [_Split(directory / name, source) for name in names]
            for split in splits:
                stack.enter_context(split.writer)
            held = _fill(splits[0], self._encoded(source), hold_out)
            splits[0].check(self._encoder, hold_out)
            for sequence in held:
                splits[-1].add(sequence)
            for split in splits:
                split.writer.commit()
            if status_of(source) != status:
                raise DataError(f"{source} was changed while it was read. Try again.")
            mismatch = self._tokenizer.mismatch(self._request.vocab_size)
            about = {
                "caches": {one.path.name: one.about() for one in splits},
                "warnings": [] if mismatch is None else [mismatch],
            }
            self._store.put(key, directory, names, about)
        if self._request.cache_bytes is not None:
            self._store.prune(self._request.cache_bytes)

    def _encoded(self, source: Path) -> Iterator[Encoded]:
        encoder = self._encoder
        if source.suffix.lower() == ".txt":
            return encoder.windows(iter_plain(source), source)
        return encoder.encode_all(iter_records(source, self._request.features))


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
        raise EmptyDataError(
            f"{self.source} leaves nothing to train on: in all {self.dropped_records} records, "
            f"no token that is a label comes within the first {encoder.max_seq_length}. Raise "
            "--max-seq-length"
            + (", or train without --mask-prompt." if encoder.mask_prompt else ".")
        )

    def about(self) -> dict[str, int]:
        """The counts, as SplitReport names them."""
        return {
            "records": self.records,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "longest": self.longest,
            "truncated_records": self.truncated_records,
            "dropped_tokens": self.dropped_tokens,
            "dropped_records": self.dropped_records,
        }


def _peak_bytes() -> int:
    """The most memory that this process had; getrusage would count its parent's before the exec."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def answer(request: str) -> str:
    """The JSON answer to a JSON request.

    Args:
        request: what `PrepareRequest.to_json` wrote.

    Returns:
        What `PrepareReport.from_dict` reads.
    """
    return run(PrepareRequest.from_json(request)).to_json()
