"""Which truth fits in memory, told before anything is computed.

The best truth is plain autograd in float64. It keeps every activation, all logits and a widened
copy of every weight that is not stored in that precision; where that does not fit, the next of
`truths` is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lowtide.errors import ConfigError
from lowtide.methods import MethodOptions
from lowtide.model.adapter import Adapter
from lowtide.model.batch import Batch
from lowtide.model.decoder import Decoder
from lowtide.model.spec import ModelSpec
from lowtide.weights.checkpoint import dtype_name

_MARGIN_BYTES = 32_000_000
_TILE_WIDTH, _TILES = 512, 2_000_000  # of `model.workspace`: columns at most, elements of tiles


@dataclass(frozen=True)
class Truth:
    """A way to get gradients that others are held against, and the memory that it needs."""

    method: str
    dtype: torch.dtype
    needed_bytes: int
    options: MethodOptions = field(default_factory=MethodOptions)

    @property
    def name(self) -> str:
        """`autograd float64`; with how mebp forms its loss."""
        full = " with full logits" if self.options.mebp_loss == "full" else ""
        return f"{self.method} {dtype_name(self.dtype)}{full}"


def choose_truth(model: Decoder, adapter: Adapter, batch: Batch, available: int) -> Truth:
    """The best truth that fits.

    Args:
        model: in the precision that is checked.
        adapter: for its size.
        batch: for its tokens.
        available: bytes that may be taken.

    Returns:
        The first of `truths` that needs no more.

    Raises:
        ConfigError: not even the smallest fits.
    """
    candidates = truths(model, adapter, batch)
    for truth in candidates:
        if truth.needed_bytes <= available:
            return truth
    needed = candidates[-1].needed_bytes
    raise ConfigError(
        f"a check of {sum(batch.lengths):,} tokens needs about {needed / 1e6:,.0f} MB even with "
        f"the smallest reference, and {available / 1e6:,.0f} MB are available. Lower --records, "
        "--max-seq-length or --lora-r, or close other programs."
    )


def truths(model: Decoder, adapter: Adapter, batch: Batch) -> Sequence[Truth]:
    """Every truth, the best first.

    float64 autograd; float32 autograd, where that is the precision that is checked; mebp, which is
    autograd block by block over tiles of weights, in float64, with a loss of its own; the same
    with the loss that mesp has too.
    """
    wide, narrow = torch.float64, model.compute_dtype
    plain = [Truth("autograd", wide, autograd_bytes(model, adapter, batch, wide))]
    if narrow != wide:
        plain.append(Truth("autograd", narrow, autograd_bytes(model, adapter, batch, narrow)))
    return [
        *plain,
        *(
            Truth(
                "mebp", wide, mebp_bytes(model, adapter, batch, loss), MethodOptions(mebp_loss=loss)
            )
            for loss in ("full", "sweep")
        ),
    ]


def autograd_bytes(model: Decoder, adapter: Adapter, batch: Batch, dtype: torch.dtype) -> int:
    """The peak of `autograd` in a precision, with all that a check holds beside it.

    Args:
        model: the frozen model.
        adapter: for its rank, dropout and size.
        batch: for its tokens.
        dtype: of the computation.

    Returns:
        Bytes: widened weights, every block's activations, one block's gradients, logits.
    """
    spec = model.spec
    weights = spec.num_layers * spec.linear_parameters()
    weights += spec.vocab_size * spec.hidden_size
    if model.stored_dtypes == [dtype_name(dtype)]:
        weights = 0  # they are the mapped file's
    blocks = spec.num_layers * _block_elements(spec, adapter, batch)
    blocks += _block_gradients(spec, batch)
    if adapter.config.use_dora:  # W + s B A of one linear, whole
        blocks += 2 * max(math.prod(spec.linear_shape(name)) for name in spec.linears)
    return _with_margin((weights + blocks + _logits(spec, batch)) * dtype.itemsize, adapter)


def mebp_bytes(model: Decoder, adapter: Adapter, batch: Batch, loss: str) -> int:
    """The peak of `mebp` in float64, with all that a check holds beside it.

    Args:
        model: the frozen model.
        adapter: for its rank, dropout and size.
        batch: for its tokens.
        loss: `full` or `sweep`.

    Returns:
        Bytes: block inputs, one block's activations and gradients, and the logits if they are full.
    """
    spec, tokens = model.spec, sum(batch.lengths)
    elements = (spec.num_layers + 10) * tokens * max(spec.hidden_size, spec.q_width)
    elements += _TILES + 4 * _TILE_WIDTH * tokens
    elements += _block_elements(spec, adapter, batch) + _block_gradients(spec, batch)
    if loss == "full":
        elements += _logits(spec, batch)
    return _with_margin(elements * torch.float64.itemsize, adapter)


def _block_elements(spec: ModelSpec, adapter: Adapter, batch: Batch) -> int:
    """What autograd keeps of a block: counted from `model.reference`, all linears adapted."""
    tokens = sum(batch.lengths)
    inputs = sum(spec.linear_shape(name)[1] for name in spec.linears)
    per_token = 4 * spec.hidden_size + 4 * spec.q_width + 4 * spec.intermediate_size
    per_token += len(spec.linears) * max(rank for _, _, rank in adapter.config.adapted(spec))
    per_token += 4 * spec.head_dim * len(spec.ropes)
    if adapter.config.use_dora:  # what each row's factor multiplies
        per_token += 2 * sum(spec.linear_shape(name)[0] for name in spec.linears)
    # A norm keeps its input, what it is divided by and the quotient; a factor keeps nothing.
    per_token += 3 * spec.raw_width
    per_token += 3 * spec.hidden_size * sum(name is not None for name in spec.norms[1::2])
    if adapter.config.lora_dropout > 0:  # each linear's mask, and its input as masked
        per_token += 2 * inputs
    scores = sum(length * length for length in batch.lengths)
    # The causal mask's booleans, of a byte each, are less than another head's scores.
    matrices = spec.num_heads * (2 if spec.attention_softcap else 1) + 1
    return tokens * per_token + matrices * scores


def _block_gradients(spec: ModelSpec, batch: Batch) -> int:
    """What exists only while one block is computed."""
    tokens, longest = sum(batch.lengths), max(batch.lengths)
    return tokens * (4 * spec.intermediate_size + 4 * spec.hidden_size) + (
        3 * spec.num_heads * longest * longest
    )


def _logits(spec: ModelSpec, batch: Batch) -> int:
    """Logits, their log-softmax, and the gradients of both, three of which live at a time."""
    return 3 * sum(batch.lengths) * spec.vocab_size


def _with_margin(needed: int, adapter: Adapter) -> int:
    """With the adapters and gradients of a check, and a tenth for the allocator."""
    held = 40 * adapter.n_parameters  # two adapters, three gradients, in 4 and 8 bytes
    return int(1.1 * (needed + held)) + _MARGIN_BYTES
