"""The fastest setting that fits a memory budget, by the predictions of `memory.plan`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowtide.errors import ConfigError
from lowtide.methods.options import MethodOptions
from lowtide.model.workspace import TILES
from lowtide.ops.products import goes_to_onednn
from lowtide.train.states import STATES

from .plan import PLANNED, Plan, Workload, optimizer_bytes, predict


def candidates(work: Workload, asked: MethodOptions) -> Iterator[Plan]:
    """Settings from the fastest to the smallest; what was asked for is not changed.

    Args:
        work: what is to be done.
        asked: options; those that differ from their defaults are the user's.

    Yields:
        Plans of falling speed.
    """
    usual = MethodOptions()
    keeps = [asked.keep_blocks]
    if work.method == "mesp" and asked.keep_blocks == usual.keep_blocks:
        keeps = list(range(work.shape.trained_blocks, -1, -1))
    places = [asked.block_inputs]
    if work.method == "mesp" and asked.block_inputs == usual.block_inputs:
        places = ["memory", "file"]
    tiles = [asked.tiles] if asked.tiles != usual.tiles else list(TILES)
    yield from (predict(work, replace(asked, keep_blocks=number)) for number in keeps)
    least = replace(asked, keep_blocks=keeps[-1])
    yield from (predict(work, replace(least, block_inputs=place)) for place in places[1:])
    least = replace(least, block_inputs=places[-1])
    yield from (predict(work, replace(least, tiles=tile)) for tile in tiles[1:])
    if asked.products == usual.products and work.dtype == torch.float32 and goes_to_onednn():
        yield predict(work, replace(least, tiles=tiles[-1], products="torch"))


def choose(work: Workload, asked: MethodOptions, budget_bytes: int) -> Plan:
    """The fastest setting within a budget.

    Args:
        work: what is to be done.
        asked: options; those that differ from their defaults are kept.
        budget_bytes: for `peak_anon_bytes`.

    Returns:
        The first of `candidates` that fits.

    Raises:
        ConfigError: none fits; says the smallest budget that would do, and the longest sequence
            that this one allows.
    """
    check_planned(work.method)
    plans = list(candidates(work, asked))
    for plan in plans:
        if plan.needed_bytes <= budget_bytes:
            return plan
    least = min(plan.needed_bytes for plan in plans)
    length = longest_that_fits(work, asked, budget_bytes)
    shorter = (
        f"sequences of up to {length:,} tokens would fit"
        if length
        else "no sequence length would fit: lower --lora-r, adapt fewer linears with "
        "--target-modules, or take --optimizer sgd"
    )
    raise ConfigError(
        f"--memory-budget {budget_bytes / 1e6:,.1f} MB is too small for {work.tokens:,} tokens: "
        f"the smallest that would do is {round_up(least)} MB; with this budget {shorter}."
        f"{_with_lossy(work, asked)}"
    )


@dataclass(frozen=True)
class Lossy:
    """A lossy setting that nobody but the user chooses, as flags, and the bytes that it saves."""

    setting: str
    saves_bytes: int


def lossy(work: Workload) -> list[Lossy]:
    """Lossy settings that would take less memory than those of `work`, the least lossy first."""
    return [Lossy(flags, optimizer_bytes(work) - optimizer_bytes(w)) for flags, w in _lossy(work)]


def _lossy(work: Workload) -> Iterator[tuple[str, Workload]]:
    for state in STATES:
        other = replace(work, state=state)
        if state != "float32" and optimizer_bytes(other) < optimizer_bytes(work):
            yield f"--optimizer-state {state}", other


def _with_lossy(work: Workload, asked: MethodOptions) -> str:
    """A sentence on the smallest budgets with lossy settings; empty where there are none."""
    parts = [
        f"{flags} to {round_up(min(p.needed_bytes for p in candidates(other, asked)))} MB"
        for flags, other in _lossy(work)
    ]
    if not parts:
        return ""
    return f" Lossy settings, which are yours to choose, lower the smallest: {', '.join(parts)}."


def round_up(count: int) -> str:
    """Bytes as MB, rounded up to a tenth, so that the figure can be given as a budget."""
    return f"{-(-count // 100_000) / 10:,.1f}"


def longest_that_fits(work: Workload, asked: MethodOptions, budget_bytes: int) -> int:
    """The longest sequence, in a batch of as many, that some setting fits into a budget.

    Args:
        work: whose lengths are replaced.
        asked: options.
        budget_bytes: for `peak_anon_bytes`.

    Returns:
        Tokens, at most the model's positions; 0 where not even two fit.
    """

    def fits(length: int) -> bool:
        at = replace(work, lengths=(length,) * len(work.lengths))
        return any(p.needed_bytes <= budget_bytes for p in candidates(at, asked))

    low, high = 1, work.spec.max_positions
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low if low > 1 else 0


def check_planned(method: str) -> None:
    """Refuse a method whose memory cannot be planned.

    Args:
        method: its name.

    Raises:
        ConfigError: names those that can.
    """
    if method not in PLANNED:
        raise ConfigError(
            f"--memory-budget cannot be kept by --method {method}, whose memory autograd decides. "
            f"Use one of {', '.join(PLANNED)}."
        )


def chosen(options: MethodOptions) -> dict[str, Any]:
    """What the planner decided, by setting."""
    names = ("keep_blocks", "block_inputs", "tiles", "products")
    return {name: getattr(options, name) for name in names}
