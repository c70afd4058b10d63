"""`lowtide bench lengths`: how memory and time grow with the sequence."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lowtide.config import setting
from lowtide.errors import ConfigError
from lowtide.train.settings import check_step

from .case import command_kind
from .split import PARTS, check_split
from .step import MeasuredStepSettings, located


@dataclass(frozen=True, kw_only=True)
class LengthsSettings(MeasuredStepSettings):
    """Settings of `lowtide bench lengths`."""

    lengths: str = setting(
        "256,1024,4096,8192", help="tokens per sequence, each in a process of its own", listed=True
    )
    steps: int = setting(1, help="measured steps, after one that warms up", minimum=1)


def bench_lengths(settings: LengthsSettings, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure steps of several lengths, each in a fresh process.

    Args:
        settings: model, method, lengths.
        say: told of progress.

    Returns:
        `lengths`: the results of `lowtide bench step --time-split`; `bytes_per_token`: the slope
        of `peak_anon_bytes` between the shortest and the longest; `slopes`: between neighbours.

    Raises:
        ConfigError: a length is no number, or there are not two.
        LowtideError: a step could not be made; says why.
    """
    lengths = _lengths(settings.lengths)
    check_step(settings)
    check_split(settings.method)
    located(settings, say)  # weights of a shape are written before anything is measured
    given = asdict(settings)
    del given["lengths"]
    measure, results = command_kind("bench", "step"), []
    with tempfile.TemporaryDirectory(prefix="lowtide-") as scratch:
        for length in lengths:
            say(f"T = {length:,}")
            results.append(measure({**given, "seq_len": length, "time_split": True}, Path(scratch)))
    return {
        "bytes_per_token": _slope(results[0], results[-1]),
        "slopes": [_slope(a, b) for a, b in pairwise(results)],
        "lengths": results,
    }


def _lengths(text: str) -> list[int]:
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        lengths = []
    if len(lengths) < 2 or lengths[0] < 2:
        raise ConfigError(
            f"lengths = {text!r}: expected two or more whole numbers from 2, such as 256,1024."
        )
    return lengths


def _slope(a: dict[str, Any], b: dict[str, Any]) -> float:
    return float((b["peak_anon_bytes"] - a["peak_anon_bytes"]) / (b["seq_len"] - a["seq_len"]))


def lengths_lines(result: dict[str, Any]) -> Iterator[str]:
    """A Markdown table: a row per length, and the slope.

    Args:
        result: of `bench_lengths`.

    Yields:
        Lines.
    """
    heads = ("T", "peak_anon MB", "wall s", "CPU s", "ms/token", "gemm_utilization")
    names = [*heads, *(f"{part} %" for part in PARTS), "attention ms/token"]
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    for one in result["lengths"]:
        split, tokens = one["time_split_s"], one["seq_len"] * one["batch_size"]
        whole = sum(split.values())
        cells = [
            f"{one['seq_len']:,}",
            f"{one['peak_anon_bytes'] / 1e6:,.1f}",
            f"{one['wall_s']:,.1f}",
            f"{one['cpu_s']:,.1f}",
            f"{1e3 * one['wall_s'] / tokens:.1f}",
            f"{one['gemm_utilization']:.2f}",
            *(f"{100 * split[part] / whole:.1f}" for part in PARTS),
            f"{1e3 * split['attention'] / tokens:.2f}",
        ]
        yield "| " + " | ".join(cells) + " |"
    slopes = ", ".join(f"{slope:,.0f}" for slope in result["slopes"])
    yield ""
    yield (
        f"Slope of peak_anon_bytes: {result['bytes_per_token']:,.0f} bytes per token "
        f"(between neighbours: {slopes})."
    )
