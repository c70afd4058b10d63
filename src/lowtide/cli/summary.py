"""What `lowtide train` says at the end: what was done, what it cost, where it is, what is next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from lowtide.config import flag
from lowtide.export.peft import CONFIG_FILE, WEIGHTS_FILE
from lowtide.train.history import TrainResult
from lowtide.train.observers import Cost
from lowtide.train.output import EVENTS_FILE, METRICS_FILE, SETTINGS_FILE
from lowtide.train.settings import TrainSettings

from .output import duration, megabytes

_FOR_MODEL = ("compute_dtype", "quantize", "resident_weights")
_FOR_TEXT = ("tokenizer", "chat_template")
_FOR_DATA = ("prompt_feature", "completion_feature", "text_feature", "chat_feature")


def summary(settings: TrainSettings, result: TrainResult, cost: Cost) -> Iterator[str]:
    """Lines for people.

    Args:
        settings: of the run.
        result: what it did.
        cost: what it took.

    Yields:
        One line after the other.
    """
    yield _done(settings, result)
    paused = f", {duration(cost.paused_s)} of it paused" if cost.paused_s else ""
    energy = "" if cost.energy_j is None else f", {cost.energy_j / 3600:,.1f} Wh"
    yield (
        f"took     {duration(cost.elapsed_s)} by the clock{paused}, {duration(cost.cpu_s)} CPU "
        f"with all around the updates{energy}"
    )
    yield (
        f"memory   peak_anon_bytes {megabytes(result.peak_anon_bytes)} (private memory above the "
        f"import), peak_rss_bytes {megabytes(result.peak_rss_bytes)} (whole process, mapped "
        "weights included)"
    )
    yield f"files    {_files(Path(settings.adapter_path).expanduser())}"
    for place, command in enumerate(_next(settings)):
        yield f"{'next' if place == 0 else '':<8} {command}"


def _done(settings: TrainSettings, result: TrainResult) -> str:
    verb = "interrupted after" if result.interrupted else "done:"
    if result.stopped_early:
        verb = (
            f"stopped early, after {settings.early_stopping_patience} validations without "
            "improvement:"
        )
    valid = "" if result.valid_loss is None else f", validation loss {result.valid_loss:.4f}"
    return (
        f"{verb} {result.steps} updates, {result.n_tokens:,} trained tokens in "
        f"{duration(result.wall_s)} ({duration(result.cpu_s)} CPU), last loss "
        f"{result.loss:.4f}{valid}"
    )


def _files(directory: Path) -> str:
    weights = directory / WEIGHTS_FILE
    size = f" ({megabytes(weights.stat().st_size)})" if weights.exists() else ""
    others = ", ".join((CONFIG_FILE, SETTINGS_FILE, METRICS_FILE, EVENTS_FILE))
    return f"{weights}{size}, {others}"


def _next(settings: TrainSettings) -> Iterator[str]:
    """Commands to go on with, as a shell takes them."""
    here = ["--model", settings.model, "--adapter-path", settings.adapter_path]
    model = here + _flags(settings, _FOR_MODEL) + _flags(settings, _FOR_TEXT)
    data = settings.valid_data or settings.data
    length = ["--max-seq-length", str(settings.max_seq_length)]
    masked = ["--mask-prompt"] if settings.mask_prompt else []
    yield f'{shlex.join(["lowtide", "generate", *model])} --prompt "..."'
    yield shlex.join(
        ["lowtide", "eval", *model, "--data", data, *length, *masked, *_flags(settings, _FOR_DATA)]
    )
    yield shlex.join(["lowtide", "report", settings.adapter_path])


def _flags(settings: TrainSettings, names: tuple[str, ...]) -> list[str]:
    """Flags of the settings that are not what they are by themselves."""
    out = []
    for name in names:
        value = getattr(settings, name)
        if value is not None and value != type(settings).__dataclass_fields__[name].default:
            out += [flag(name), str(value)]
    return out
