"""What a run will need, predicted before it starts, and the fastest setting that fits a budget.

The bytes of a step by kind follow from `ModelSpec`, the batch, the adapter and the options: every
buffer is one that the code below `methods` makes, counted with the same functions. What is not a
buffer is small: an adapter's gradients and rank-sized products on their way to the optimiser, tiles
of attention, the product library's packing buffers, pages that malloc keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowtide.errors import ConfigError
from lowtide.methods.options import MethodOptions
from lowtide.model.adapter import LoraConfig
from lowtide.model.kept import kept_elements
from lowtide.model.spec import ModelSpec
from lowtide.model.workspace import TILES, Workspace, mlp_tile_width, score_capacity
from lowtide.ops.attention import allocated_elements, self_segments
from lowtide.train.states import STATES, master_bytes, packing_bytes, state_bytes
from lowtide.weights.storages import STORAGES

KINDS = (
    "adapter", "optimizer", "gradients", "block inputs", "kept blocks", "stored h", "buffers",
    "intermediates", "model", "libraries",
)  # fmt: skip
PLANNED = ("mesp", "lcsb", "mezo")
"""Methods whose memory is planned; the others' is autograd's to decide."""
_LIBRARIES = 3_000_000
_SPARE_BYTES, _SPARE_SHARE = 3_000_000, 0.04
_MOMENTS = {"sgd": 0, "adamw": 2}


@dataclass(frozen=True)
class Workload:
    """What a run is to do, none of which the planner may change.

    Attributes:
        spec: the model.
        config: the adapter.
        method: one of PLANNED.
        optimizer: its name.
        momentum: whether sgd keeps a buffer.
        accumulates: whether the gradients of all parameters live at once.
        lengths: tokens of each sequence of the largest batch.
        dtype: of the computation.
        widened: whether weights are stored in another dtype, so that tiles are widened.
        state: how the optimiser keeps its state, a name of `train.states.STATES`.
        rounded: whether the adapter is in bfloat16 and the optimiser keeps the rest of it.
        storage: of quantised weights, a name of STORAGES.
    """

    spec: ModelSpec
    config: LoraConfig
    method: str
    optimizer: str
    momentum: bool
    accumulates: bool
    lengths: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    widened: bool = True
    state: str = "float32"
    rounded: bool = False
    storage: str | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the largest batch."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Plan:
    """A setting and what it is predicted to take.

    Attributes:
        options: of the method.
        by_kind: bytes by KINDS at the step's peak.
    """

    options: MethodOptions
    by_kind: dict[str, int]

    @property
    def predicted_peak_bytes(self) -> int:
        """Of `peak_anon_bytes`."""
        return sum(self.by_kind.values())

    @property
    def needed_bytes(self) -> int:
        """The smallest budget for this setting: the prediction and what it may be wrong by."""
        peak = self.predicted_peak_bytes
        return peak + max(_SPARE_BYTES, int(_SPARE_SHARE * peak))


def predict(work: Workload, options: MethodOptions) -> Plan:
    """Bytes by kind at the peak of a step.

    Args:
        work: what is to be done.
        options: how.

    Returns:
        The plan of these options.
    """
    spec, size, tokens = work.spec, work.dtype.itemsize, work.tokens
    layers, rank = spec.num_layers, work.config.r
    adapter = adapter_parameters(spec, work.config)
    backward = work.method != "mezo"
    elements = {
        "block inputs": _row_count(work, options) * tokens * spec.hidden_size,
        "kept blocks": options.keep_blocks * kept_elements(spec) * tokens,
        "stored h": 0
        if options.recompute_h
        else len(work.config.linears(spec)) * layers * rank * tokens,
        "intermediates": _intermediates(work, backward),
        "model": layers * (_vectors(spec) + _biases(spec)) + spec.hidden_size,
    }
    by_kind = {kind: count * size for kind, count in elements.items()}
    # A block's A and B are widened while it is computed, the next block's before they are freed.
    by_kind["adapter"] = adapter * size
    if work.rounded:
        by_kind["adapter"] = 2 * adapter + 2 * size * (adapter // layers)
    by_kind["optimizer"] = optimizer_bytes(work)
    by_kind["gradients"] = accumulated_bytes(work) if work.accumulates else 0
    by_kind["intermediates"] += _unpacking_bytes(work, options)
    if options.block_inputs == "file":
        by_kind["block inputs"] = 0
    by_kind["buffers"] = _workspace_bytes(work, options)
    by_kind["libraries"] = _LIBRARIES
    return Plan(options, {kind: by_kind[kind] for kind in KINDS})


def optimizer_bytes(work: Workload) -> int:
    """Bytes of the optimiser's state, and of the rest of a rounded adapter."""
    sizes = [
        work.config.r * width
        for name in work.config.linears(work.spec)
        for width in work.spec.linear_shape(name)
    ] * work.spec.num_layers
    moments = 1 if work.momentum and work.optimizer == "sgd" else _MOMENTS[work.optimizer]
    itemsize = 4 if work.rounded else work.dtype.itemsize
    held = moments * state_bytes(work.state, sizes, itemsize)
    if moments:
        held += packing_bytes(work.state)
    return held + (master_bytes(sizes) if work.rounded else 0)


def accumulated_bytes(work: Workload) -> int:
    """Bytes of the gradients of all parameters."""
    return adapter_parameters(work.spec, work.config) * work.dtype.itemsize


def adapter_parameters(spec: ModelSpec, config: LoraConfig) -> int:
    """Parameters of an adapter on every block."""
    return spec.num_layers * config.r * sum(sum(spec.linear_shape(n)) for n in config.linears(spec))


def _row_count(work: Workload, options: MethodOptions) -> int:
    """Hidden-sized rows of `methods.structured.places`."""
    if work.method == "mezo":
        return 2
    layers = work.spec.num_layers
    if work.method == "lcsb":
        return (options.lcsb_blocks or max(1, layers // 2)) + 2
    return layers + 1


def _workspace_bytes(work: Workload, options: MethodOptions) -> int:
    with torch.device("meta"):
        ws = Workspace(work.spec, work.tokens, max(work.lengths), work.dtype, options.tiles)
    return ws.nbytes - ws.untouched_bytes(
        backward=work.method != "mezo",
        widened=work.widened,
        recomputes=options.keep_blocks < work.spec.num_layers,
    )


def _unpacking_bytes(work: Workload, options: MethodOptions) -> int:
    """What unpacking the largest tile of quantised weights takes beside the tile."""
    if work.storage is None:
        return 0
    spec, storage, size = work.spec, STORAGES[work.storage], work.dtype.itemsize
    hidden, inner = spec.hidden_size, spec.intermediate_size
    width = mlp_tile_width(spec, work.tokens, options.tiles)
    rows = storage.scratch_bytes(2 * width, (0, hidden), hidden, size)
    return max(rows, storage.scratch_bytes(hidden, (0, width), inner, size))


def _vectors(spec: ModelSpec) -> int:
    return sum(math.prod(shape) for shape in spec.vector_shapes().values())


def _biases(spec: ModelSpec) -> int:
    return sum(spec.linear_shape(name)[0] for name in spec.biased)


def _intermediates(work: Workload, backward: bool) -> int:
    """What is allocated and freed within a block, at its largest."""
    spec, tokens, rank = work.spec, work.tokens, work.config.r
    wide = max(spec.hidden_size, spec.q_width)
    rotary = tokens * sum(rope.rotated or spec.head_dim for rope in spec.ropes)
    norms = {None: 0, "head": spec.num_heads + spec.num_kv_heads, "full": 2}[spec.qk_norm]
    statistics = tokens * (2 * spec.num_heads + 3 + norms)
    segments, capacity = self_segments(work.lengths), score_capacity(spec, max(work.lengths))
    attention = max(
        allocated_elements(segments, heads, work.dtype, capacity, backward=backward)
        for heads in spec.kinds_of_heads()
    )
    targets = work.config.linears(spec)
    if backward:
        adapters = rank * (_gradient_columns(spec, targets) + 6 * tokens)
    else:  # a block has a moved copy of its adapter, and a direction is drawn
        adapters = adapter_parameters(spec, work.config) // spec.num_layers
    dropout = 0
    if work.config.lora_dropout:  # the input as masked; down's comes in tiles, which are narrower
        masked = tokens * max(min(spec.linear_shape(name)[1], wide) for name in targets)
        dropout = masked
    return rotary + statistics + max(attention, adapters) + dropout


def _gradient_columns(spec: ModelSpec, targets: Sequence[str]) -> int:
    """Columns of A and B whose gradients live at one time: the MLP's, or one linear's."""
    inner, hidden = spec.intermediate_size, spec.hidden_size
    roles = [role for one in spec.projections if one.name in targets for role in one.roles]
    mlp = [role for role in roles if role in ("gate", "up", "down")]
    # gate's and up's dB and down's dA grow over the tiles; then one is laid out for the sink.
    both = (len(mlp) + 1) * inner + hidden if mlp else 0
    # Those of a fused projection are held until its last role has come, and then joined.
    fused = [
        2 * spec.linear_shape(one.name)[0] + 2 * hidden
        for one in spec.projections
        if one.name in targets and len(one.roles) > 1
    ]
    return max(both, *fused, *(sum(spec.linear_shape(name)) for name in targets))


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
        keeps = list(range(work.spec.num_layers, -1, -1))
    places = [asked.block_inputs]
    if work.method == "mesp" and asked.block_inputs == usual.block_inputs:
        places = ["memory", "file"]
    tiles = [asked.tiles] if asked.tiles != usual.tiles else list(TILES)
    yield from (predict(work, replace(asked, keep_blocks=number)) for number in keeps)
    least = replace(asked, keep_blocks=keeps[-1])
    yield from (predict(work, replace(least, block_inputs=place)) for place in places[1:])
    least = replace(least, block_inputs=places[-1])
    yield from (predict(work, replace(least, tiles=tile)) for tile in tiles[1:])


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
    names = ("keep_blocks", "block_inputs", "tiles")
    return {name: getattr(options, name) for name in names}
