"""What a run will need, predicted before it starts.

The bytes of a step by kind follow from `ModelSpec`, the batch, the adapter and the options: every
buffer is one that the code below `methods` makes, counted with the same functions. What is not a
buffer is small: an adapter's gradients and rank-sized products on their way to the optimiser, tiles
of attention, the product library's packing buffers, pages that malloc keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lowtide.methods.options import MethodOptions
from lowtide.methods.structured import kept_inputs
from lowtide.model.adapter import LoraConfig, adapter_shapes
from lowtide.model.kept import kept_elements
from lowtide.model.spec import ModelSpec
from lowtide.model.workspace import Workspace, mlp_tile_width, score_capacity
from lowtide.notebook import megabytes, table
from lowtide.ops.attention import allocated_elements, self_segments
from lowtide.ops.dropout import DRAW_BYTES
from lowtide.ops.products import (
    KERNEL_BYTES,
    goes_to_onednn,
    kernels,
    products_as,
    scratch_bytes,
)
from lowtide.train.optim import OPTIMIZERS, Held
from lowtide.train.states import master_bytes
from lowtide.weights.storages import READ

from .adapters import AdapterShape

KINDS = (
    "adapter", "optimizer", "gradients", "block inputs", "kept blocks", "stored h", "row norms",
    "buffers", "intermediates", "model", "kernels", "libraries",
)  # fmt: skip
_ROLES = ("q", "k", "v", "o", "gate", "up", "down")
PLANNED = ("mesp", "lcsb", "mezo")
"""Methods whose memory is planned; the others' is autograd's to decide."""
_LIBRARIES, _KEPT_SHARE = 3_300_000, 0.02
_SPARE_BYTES, _SPARE_SHARE = 3_000_000, 0.04


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
        widened: whether tiles are converted from what is stored, and not views of it.
        reordered: whether rows of some matrices are copied, being stored in another order.
        state: how the optimiser keeps its state, a name of `train.states.STATES`.
        rounded: whether the adapter is in bfloat16 and the optimiser keeps the rest of it.
        storages: what matrices are unpacked from, names of `weights.storages.READ`.
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
    reordered: bool = False
    state: str = "float32"
    rounded: bool = False
    storages: tuple[str, ...] = ()

    @property
    def shape(self) -> AdapterShape:
        """The adapter on the model."""
        return AdapterShape(self.spec, self.config)

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

    def _repr_html_(self) -> str:
        kinds = sorted(self.by_kind.items(), key=lambda item: -item[1])
        rows = [(kind, megabytes(count)) for kind, count in kinds if count]
        return table("a step's peak", [*rows, ("together", megabytes(self.predicted_peak_bytes))])


def predict(work: Workload, options: MethodOptions) -> Plan:
    """Bytes by kind at the peak of a step.

    Args:
        work: what is to be done.
        options: how.

    Returns:
        The plan of these options.
    """
    with products_as(options.products):
        return _predict(work, options)


def _predict(work: Workload, options: MethodOptions) -> Plan:
    spec, size, tokens = work.spec, work.dtype.itemsize, work.tokens
    layers, shape = spec.num_layers, work.shape
    adapter = shape.parameters
    backward = work.method != "mezo"
    elements = {
        "block inputs": _row_count(work, options) * tokens * spec.hidden_size,
        "kept blocks": options.keep_blocks * kept_elements(spec) * tokens,
        "stored h": 0 if options.recompute_h else shape.stored_h(tokens),
        "row norms": shape.row_norms,
        "intermediates": _intermediates(work, options, backward),
        "model": layers * (_vectors(spec) + _biases(spec)) + spec.hidden_size,
    }
    by_kind = {kind: count * size for kind, count in elements.items()}
    # A block's A and B are widened while it is computed, the next block's before they are freed.
    by_kind["adapter"] = adapter * size
    if work.rounded:
        by_kind["adapter"] = 2 * adapter + 2 * size * shape.of_block
    by_kind["optimizer"] = optimizer_bytes(work)
    by_kind["gradients"] = accumulated_bytes(work) if work.accumulates else 0
    by_kind["intermediates"] += _unpacking_bytes(work, options)
    by_kind["intermediates"] += DRAW_BYTES if work.config.lora_dropout else 0
    if options.block_inputs == "file":
        by_kind["block inputs"] = 0
    by_kind["buffers"] = _workspace_bytes(work, options)
    by_kind["kernels"] = _kernel_bytes(work, options, backward)
    # And what malloc keeps between the pieces that come and go, which grows with what they are of.
    pieces = sum(by_kind.values()) - by_kind["optimizer"] - by_kind["gradients"]
    by_kind["libraries"] = _LIBRARIES + int(_KEPT_SHARE * pieces)
    return Plan(options, {kind: by_kind[kind] for kind in KINDS})


def optimizer_bytes(work: Workload) -> int:
    """Bytes of the optimiser's state, and of the rest of a rounded adapter."""
    shapes = list(adapter_shapes(work.spec, work.config).values())
    itemsize = 4 if work.rounded else work.dtype.itemsize
    held = Held(shapes, itemsize, work.state, work.momentum)
    rest = master_bytes(map(math.prod, shapes)) if work.rounded else 0
    return OPTIMIZERS[work.optimizer].held_bytes(held) + rest


def accumulated_bytes(work: Workload) -> int:
    """Bytes of the gradients of all parameters."""
    return work.shape.parameters * work.dtype.itemsize


def _row_count(work: Workload, options: MethodOptions) -> int:
    """Hidden-sized rows that a step touches of those that `methods.structured.places` takes."""
    if work.method == "mezo":
        return 2
    if work.method == "lcsb":
        up = options.lcsb_blocks or max(1, work.spec.num_layers // 2)
        return min(up, len(work.config.layers(work.spec))) + 2
    kept = len(kept_inputs(work.config.trained_layers(work.spec)))
    # The second of the rows that nobody needs later is for two such inputs one after the other.
    return kept + (1 if kept and kept == work.spec.num_layers - 1 else 2)


def _workspace_bytes(work: Workload, options: MethodOptions) -> int:
    with torch.device("meta"):
        ws = Workspace(work.spec, work.tokens, max(work.lengths), work.dtype, options.tiles)
    copied = 0 if work.widened or not work.reordered else ws.linear_tile.nbytes
    return (
        copied
        + ws.nbytes
        - ws.untouched_bytes(
            backward=work.method != "mezo",
            widened=work.widened,
            recomputes=options.keep_blocks < work.shape.trained_blocks,
            apart=work.config.use_dora,
        )
    )


def _kernel_bytes(work: Workload, options: MethodOptions, backward: bool) -> int:
    """What the product library keeps for each shape of a product, and one result on its way."""
    spec, tokens, hidden = work.spec, work.tokens, work.spec.hidden_size
    if work.dtype != torch.float32:
        return 0
    width = mlp_tile_width(spec, tokens, options.tiles)
    # As in training on text; with fewer labels the loss has fewer or other shapes.
    labelled = tokens - len(work.lengths)
    # Columns of a matrix that is read as it is stored have gaps between rows: not for oneDNN.
    roles = [role for role in _ROLES if work.widened or role != "down"]
    products = [(role, tokens, *spec.role_shape(role)) for role in roles]
    products.append(("head", labelled, spec.vocab_size, hidden))
    shapes: set[tuple[object, ...]] = set()
    for role, rows, out, inner in products:
        tiled, other = (inner, out) if role == "down" else (out, inner)
        # As many rows as the buffer holds, of a matrix that is narrower or wider than others.
        most = width if role == "down" else max(1, width * hidden // inner)
        for size in {min(most, tiled), tiled % most} - {0}:
            to_tile = {(m, other, size) for m in kernels(rows, size)}
            from_tile = {(m, size, other) for m in kernels(rows, other)}
            first, second = (from_tile, to_tile) if role == "down" else (to_tile, from_tile)
            shapes |= {("x W^T", *shape) for shape in first}
            if backward:
                shapes |= {("dy W", *shape) for shape in second}
    return KERNEL_BYTES * len(shapes) + scratch_bytes(tokens, hidden, work.dtype)


def _unpacking_bytes(work: Workload, options: MethodOptions) -> int:
    """What unpacking the largest tile of quantised weights takes beside the tile."""
    spec, size = work.spec, work.dtype.itemsize
    hidden, inner = spec.hidden_size, spec.intermediate_size
    width = mlp_tile_width(spec, work.tokens, options.tiles)
    most = width if goes_to_onednn() else 2 * width  # of `Workspace.linear_tile`
    tiles = ((most, (0, hidden), hidden), (hidden, (0, width), inner))
    return max(
        (READ[name].scratch_bytes(*tile, size) for name in work.storages for tile in tiles),
        default=0,
    )


def _vectors(spec: ModelSpec) -> int:
    return sum(math.prod(shape) for shape in spec.vector_shapes().values())


def _biases(spec: ModelSpec) -> int:
    return sum(spec.linear_shape(name)[0] for name in spec.biased)


def _intermediates(work: Workload, options: MethodOptions, backward: bool) -> int:
    """What is allocated and freed within a block, at its largest."""
    spec, tokens, shape = work.spec, work.tokens, work.shape
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
    # Without a backward a block has a moved copy of its adapter, and a direction is drawn.
    adapters = shape.gradients(tokens) if backward else shape.of_block
    width = mlp_tile_width(spec, tokens, options.tiles)
    adapters += shape.dora(tokens, width, backward=backward, widened=work.widened)
    dropout = 0
    if work.config.lora_dropout:  # the input as masked; down's comes in tiles, which are narrower
        dropout = tokens * max(min(spec.linear_shape(name)[1], wide) for name in targets)
    return rotary + statistics + max(attention, adapters) + dropout
