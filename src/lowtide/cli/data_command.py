"""`lowtide data check`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lowtide.config import did_you_mean, setting
from lowtide.data.census import DataCheck, SplitCheck
from lowtide.data.prepare import ask_child
from lowtide.errors import ConfigError
from lowtide.model.decoder import Decoder
from lowtide.train.recipe import MAX_BATCH
from lowtide.train.rehearsal import EpochTime, RecordLengths, time_epoch
from lowtide.train.run import check_length, data_request, open_model
from lowtide.train.settings import DataSettings, ModelSettings, StepSettings, check_step

from .output import Output, duration, settings_of

_DESCRIPTION = (
    "Look at every record of a data set as training would see it: problems with their lines, "
    "lengths, duplicates, tokens, and the time that a pass over it takes on this machine. Exit "
    "code 1 where training would refuse the data. Nothing is written."
)
_BAR = 40
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class DataCheckSettings(StepSettings, DataSettings, ModelSettings):
    """Settings of `lowtide data check`."""

    data: str = setting(
        help="file, or directory with {train,valid,test}.jsonl (.json, .txt)", filled=True
    )
    batch_size: int = setting(
        1, help="sequences per step of the time that is measured", minimum=1, maximum=MAX_BATCH
    )
    packing: bool = setting(
        False, help="count and measure batches filled up to batch size x max seq length tokens"
    )
    estimate_time: bool = setting(
        True, help="measure two training steps on the model for the time of an epoch"
    )


def run(argv: Sequence[str]) -> int:
    """Check a data set; exit code 1 where training would refuse it."""
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"usage: lowtide data check DATA --model MODEL [flags]\n\n{_DESCRIPTION}\n\n"
            "It takes --help, --config FILE.yaml and --json."
        )
        return 0 if argv else 2
    if argv[0] != "check":
        meant = did_you_mean(argv[0], ["check"])
        raise ConfigError(f"unknown command 'data {argv[0]}'{meant}. There is: data check.")
    words = list(argv[1:])
    if words and not words[0].startswith("-"):
        words[0] = f"--data={words[0]}"
    settings, output = settings_of(DataCheckSettings, "data check", _DESCRIPTION, words)
    check_step(settings)
    model = open_model(settings)
    check_length(model, settings.max_seq_length)
    with TemporaryDirectory(prefix="lowtide-") as scratch:
        return _look(settings, output, model, Path(scratch) / "lengths")


def _look(settings: DataCheckSettings, output: Output, model: Decoder, lengths: Path) -> int:
    request = data_request(settings, model, settings.data, lengths=lengths)
    found = DataCheck.from_dict(ask_child("census", request.to_json(), "splits"))
    for name, split in found.splits.items():
        for line in _split_lines(name, split, settings.max_seq_length, _block(output)):
            output.say(line)
    for line in _about_all(found):
        output.say(line)
    train, epoch = found.splits.get("train"), None
    if settings.estimate_time and train is not None and train.kept_lengths:
        epoch = time_epoch(settings, model, RecordLengths(lengths))
        output.say(_time_line(epoch, train, settings.packing))
    usable = all(split.usable for split in found.splits.values())
    output.say(_verdict(found, usable))
    output.result(_document(found, epoch, usable))
    return 0 if usable else 1


def _split_lines(name: str, split: SplitCheck, limit: int, block: str) -> Iterator[str]:
    yield f"{name}  {split.source}"
    yield (
        f"  records     {split.records:>12,}   tokens {split.tokens:,}, of which training reads "
        f"{split.kept_tokens:,} and learns {split.trained_tokens:,}"
    )
    yield from _counted("over-long", split.over_long, split.over_long_examples,
                        f"cut at --max-seq-length {limit}")  # fmt: skip
    yield from _counted("duplicates", split.duplicates, split.duplicate_examples,
                        "equal to an earlier record, by 64-bit digests")  # fmt: skip
    yield from _counted("not learnt", split.untrained, [], "left out: no trained token is left")
    for kind, count in split.problems.items():
        yield from _counted("unusable", count, split.examples[kind], kind)
    if split.unreadable is not None:
        yield f"  unreadable  {split.unreadable}"
    if split.lengths:
        yield "  lengths     tokens per record, before any is cut: " + _quantiles(split.lengths)
        yield from _histogram(split.lengths, limit, block)


def _counted(label: str, count: int, examples: Sequence[str], what: str) -> Iterator[str]:
    if not count:
        return
    yield f"  {label:<10}  {count:>12,}   {what}"
    for example in examples[:_SHOWN]:
        yield f"                               {example}"
    if examples and count > _SHOWN:
        yield f"                               and {count - min(len(examples), _SHOWN):,} more"


def _quantiles(lengths: Mapping[int, int]) -> str:
    total, seen, found = sum(lengths.values()), 0, {}
    shares = {"shortest": 0.0, "median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1.0}
    for length in sorted(lengths):
        seen += lengths[length]
        for name, share in shares.items():
            if name not in found and seen >= share * total:
                found[name] = length
    return ", ".join(f"{name} {found[name]:,}" for name in shares)


def _histogram(lengths: Mapping[int, int], limit: int, block: str) -> Iterator[str]:
    """A bar for each step of sizes 1, 2, 3, 4, 6, 8, 12, ..., and a line where records are cut."""
    edges = [1, 2]
    while edges[-1] <= max(lengths):
        edges.append(edges[-2] * 2 if len(edges) % 2 else edges[-1] * 3 // 2)
    counts = [
        sum(n for length, n in lengths.items() if low <= length < high)
        for low, high in pairwise(edges)
    ]
    first = next(i for i, count in enumerate(counts) if count)
    for i in range(first, len(counts)):
        low, high, count = edges[i], edges[i + 1] - 1, counts[i]
        width = max(1, round(_BAR * count / max(counts))) if count else 0
        cut = "  <- --max-seq-length" if low <= limit <= high else ""
        yield f"    {low:>7,} to {high:>7,} {block * width:<{_BAR}} {count:>10,}{cut}"


def _about_all(found: DataCheck) -> Iterator[str]:
    for name, count in found.shared.items():
        if count:
            of = found.splits[name].records
            yield f"shared      {count:,} of {of:,} {name} records are in train too"
    for text in found.warnings:
        yield f"warning     {text}"


def _time_line(epoch: EpochTime, train: SplitCheck, packing: bool) -> str:
    like = "as the first batch has them" if packing else "whose lengths are spread as the records'"
    return (
        f"time        about {duration(epoch.epoch_s)} per epoch with these settings: "
        f"{epoch.batches:,} batches; measured: {epoch.steps} steps of {epoch.measured_tokens:,} "
        f"tokens, {like}: {epoch.tokens_per_s:,.0f} tokens/s "
        f"for {train.kept_tokens:,} tokens"
    )


def _verdict(found: DataCheck, usable: bool) -> str:
    if not usable:
        return "training would refuse this data: mend or remove the records named above"
    notes = [
        text
        for count, text in (
            (sum(s.over_long for s in found.splits.values()), "records that are cut"),
            (sum(s.duplicates for s in found.splits.values()), "duplicates"),
            (sum(found.shared.values()), "records shared with train"),
        )
        if count
    ]
    return "the data can be trained on" + (f"; look at: {', '.join(notes)}" if notes else "")


def _document(found: DataCheck, epoch: EpochTime | None, usable: bool) -> dict[str, Any]:
    return {
        "usable": usable,
        **found.to_dict(),
        "duplicates_by": "64-bit digests of token ids",
        "time": None if epoch is None else asdict(epoch),
    }


def _block(output: Output) -> str:
    """A full block, where the stream's encoding has one."""
    try:
        "█".encode(output.stream.encoding or "ascii")
    except UnicodeEncodeError:
        return "#"
    return "█"
