"""Prepare data for training in a child process, so that this one stays small.

A tokenizer of 150,000 entries holds 60 to 75 MB, most of which an allocator never gives back. So
the parent sends a request as JSON, the child (`lowtide.data.worker`) finds mapped caches in the
`store` or tokenises into it, answers with a report, and everything that it needed dies with it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal

from lowtide.data.formats import FeatureNames
from lowtide.data.store import remove_unfinished
from lowtide.errors import KINDS, LowtideError, LowtideWarning

_STDERR_LINES = 8


@dataclass(frozen=True)
class PrepareRequest:
    """What to tokenise, how, and where to put it."""

    data: Path
    """A file, or a directory with {train,valid,test}.jsonl (.json, .txt)."""
    tokenizer: Path
    """A directory with tokenizer.json."""
    cache: Path
    """The directory of the token store."""
    max_seq_length: int
    vocab_size: int
    """The model's, to see that tokenizer and model match."""
    split: Literal["train", "eval"] = "train"
    """train: the train and valid splits. eval: the test split, else valid, or the file itself."""
    mask_prompt: bool = False
    features: FeatureNames = field(default_factory=FeatureNames)
    chat_template: str | None = None
    """A template file, "none" to use no template, or None for the tokenizer's own."""
    valid_data: Path | None = None
    """Validation data from elsewhere; wins over the data directory's own valid split."""
    valid_records: int = 0
    """Where there is no validation data, hold out this many records or windows at the end."""
    lengths: Path | None = None
    """A file that `lowtide.data.census` writes the tokens of each training record to, 4 bytes each,
    in their order, as training reads them."""
    sampled: int = 0
    """How many records `lowtide.data.sample` takes."""
    cache_bytes: int | None = None
    """How much the token store may hold in all; None does not limit it."""
    builder: str = field(default_factory=lambda: token_hex(8))
    """What the child calls its unfinished work, which the parent removes if the child cannot."""

    def to_json(self) -> str:
        """The request as the child reads it."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> PrepareRequest:
        """Read back what `to_json` wrote."""
        values = json.loads(text)
        values["features"] = FeatureNames(**values["features"])
        for name in ("data", "tokenizer", "cache", "valid_data", "lengths"):
            values[name] = None if values[name] is None else Path(values[name])
        return cls(**values)


@dataclass(frozen=True)
class SplitReport:
    """What became of one split. Counts are of what is in the cache, but for the `dropped_` ones."""

    path: Path
    """The cache."""
    source: Path
    """The file that it came from."""
    records: int
    tokens: int
    trained_tokens: int
    """Tokens that the loss counts."""
    longest: int
    """Tokens in the longest record, as kept."""
    truncated_records: int
    dropped_tokens: int
    """Tokens cut off, or dropped with their record."""
    dropped_records: int
    """Records left out because no trained token was left in them."""
    sha256: str = ""
    """Checksum of the cache."""
    from_store: bool = False
    """Whether it had been tokenised before."""

    def summary(self) -> str:
        """One line for people."""
        text = (
            f"{self.records:,} records, {self.tokens:,} tokens ({self.trained_tokens:,} trained "
            f"on), longest {self.longest:,}"
        )
        if self.truncated_records:
            text += f"; {self.truncated_records:,} truncated"
        if self.dropped_records:
            text += f"; {self.dropped_records:,} dropped with nothing left to train on"
        if self.dropped_tokens:
            text += f"; {self.dropped_tokens:,} tokens not used"
        if self.from_store:
            text += "; tokenised before"
        return text


@dataclass(frozen=True)
class PrepareReport:
    """The splits that were prepared: "train" and perhaps "valid", or "eval"."""

    splits: Mapping[str, SplitReport]
    warnings: tuple[str, ...] = ()
    """What works, but may not be meant."""
    child_peak_rss_bytes: int = 0
    """The most memory that the child had, libraries included."""

    def to_json(self) -> str:
        """The report as the parent reads it."""
        splits = {name: asdict(split) for name, split in self.splits.items()}
        return json.dumps({**asdict(self), "splits": splits}, default=str)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrepareReport:
        """Read back what `to_json` wrote."""
        splits = {}
        for name, split in values["splits"].items():
            known = {item.name: split[item.name] for item in fields(SplitReport)}
            known["path"], known["source"] = Path(split["path"]), Path(split["source"])
            splits[name] = SplitReport(**known)
        return cls(splits, tuple(values["warnings"]), values["child_peak_rss_bytes"])


def prepare(request: PrepareRequest) -> PrepareReport:
    """Tokenise a data set into mapped caches, or find them made, in a child process.

    Args:
        request: What to prepare.

    Returns:
        The caches and what is in them.

    Raises:
        LowtideError: Of the kind that the child raised, such as DataError for a bad record; or
            LowtideError itself, with the child's last words, where it died.
        KeyboardInterrupt: Ctrl-C; the child has ended and left nothing half written.
    """
    try:
        answer = ask_child("worker", request.to_json(), "splits")
    finally:
        remove_unfinished(request.cache, request.builder)
    report = PrepareReport.from_dict(answer)
    for text in report.warnings:
        warnings.warn(text, LowtideWarning, stacklevel=2)
    return report


def ask_child(worker: str, request: str, expected: str) -> dict[str, Any]:
    """Let a process that lasts as long as one request do what needs a tokenizer.

    Args:
        worker: its module in `lowtide.data`.
        request: JSON.
        expected: a key that every good answer has.

    Returns:
        The answer.

    Raises:
        LowtideError: Of the kind that the child raised, such as DataError for a bad record; or
            LowtideError itself, with the child's last words, where it died.
        KeyboardInterrupt: Ctrl-C; the child has ended.
    """
    # -P: neither the script's directory nor the working directory is searched for modules, so a
    # file named random.py there does no harm.
    command = [sys.executable, "-P", str(Path(__file__).with_name("child.py")), worker]
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        out, err = child.communicate(request.encode("utf-8"))
    except BaseException:
        child.kill()
        child.wait()
        raise
    return _answer(child.returncode, out, err, expected)


def _answer(returncode: int, out: bytes, err: bytes, expected: str) -> dict[str, Any]:
    try:
        answer = json.loads(out)
    except ValueError:
        answer = None
    if returncode == -signal.SIGINT:
        raise KeyboardInterrupt  # Ctrl-C reaches both, and the child may be the first to end
    if isinstance(answer, dict) and "error" in answer:
        raise KINDS.get(answer["error"], LowtideError)(answer["message"])
    if returncode == 0 and isinstance(answer, dict) and expected in answer:
        return answer
    lines = err.decode("utf-8", "replace").strip().splitlines()[-_STDERR_LINES:]
    ending = f"ended with code {returncode}"
    if returncode < 0:
        ending = f"was ended by signal {-returncode}"
        if returncode == -signal.SIGKILL:
            ending += ", which is how a system that is out of memory ends a process"
    said = "Its last words:\n  " + "\n  ".join(lines) if lines else "It said nothing."
    raise LowtideError(f"the process that runs the tokenizer {ending}. {said}")
