"""The arguments of a call: padded or packed rows become sequences laid end to end."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowtide.errors import ConfigError, DataError, listed
from lowtide.model.batch import IGNORED, Batch
from lowtide.model.block import Positions
from lowtide.model.decoder import Decoder
from lowtide.ops.attention import self_segments

_USED = {
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "shift_labels"),
    *("num_items_in_batch", "fused_lm_head"),
}
_SAID_BY_POSITIONS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
"""Where packed sequences begin: `position_ids` say so too, and lowtide reads those."""
_REMEDIES = {
    "use_cache": "leave it out in training; a call without labels in eval mode has a cache",
    "output_attentions": "leave it out: attention weights never exist as a whole",
    "output_hidden_states": "leave it out: a block's input is kept for its backward only",
    "return_dict": "do not set it to False: the output is an object",
    "adapter_names": "train one adapter",
}


def bound(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, as a method would bind them.

    Args:
        function: of the class; its first parameter is the module.
        args: positional ones.
        kwargs: the others.

    Returns:
        Those that are not None.
    """
    found = dict(kwargs)
    if args:
        names = [name for name in inspect.signature(function).parameters if name != "self"]
        found.update(zip(names, args, strict=False))
    return {name: value for name, value in found.items() if value is not None}


def require_known(call: Mapping[str, Any]) -> None:
    """Refuse what was asked for and would not be given.

    Args:
        call: arguments by name, without None.

    Raises:
        ConfigError: lists each with what to do.
    """
    problems = []
    for name, value in call.items():
        if name in _USED or (name == "return_dict" and value is True):
            continue
        if name in _SAID_BY_POSITIONS:
            if "position_ids" not in call:
                problems.append(f"{name} without position_ids; pass those, from 0 in each sequence")
        elif isinstance(value, Tensor) or value or name == "return_dict":
            remedy = _REMEDIES.get(name, "leave it out, or unpatch the model")
            problems.append(f"{name}; {remedy}")
    if problems:
        raise ConfigError(f"a patched model does not take:\n{listed(problems)}")


class Laid(NamedTuple):
    """Rows of a call as lowtide computes them.

    Attributes:
        shape: `(B, S)` of the call.
        places: `(T,)`, where each token is among the `B S` positions.
        lengths: tokens of each sequence.
        at: segments and rotary tables.
    """

    shape: tuple[int, int]
    places: Tensor
    lengths: tuple[int, ...]
    at: Positions

    def padded(self, x: Tensor) -> Tensor:
        """`(T, n)` as `(B, S, n)`, with zeros where no token is; differentiable."""
        rows = self.shape[0] * self.shape[1]
        if len(x) == rows:
            return x.view(*self.shape, -1)
        return x.new_zeros(rows, x.shape[1]).index_copy(0, self.places, x).view(*self.shape, -1)


def lay_out(embeds: Tensor, call: Mapping[str, Any], decoder: Decoder) -> Laid:
    """Find the sequences as transformers does: by the mask, or by positions that do not follow on.

    Args:
        embeds: `(B, S, H)`.
        call: arguments by name.
        decoder: for the rotary tables.

    Returns:
        Sequences of at least one token.

    Raises:
        DataError: the mask is no mask of padding, or there is no token.
    """
    batch, width = embeds.shape[:2]
    default = torch.arange(width, device=embeds.device).unsqueeze(0)
    positions = call.get("position_ids", default).expand(batch, -1).long()
    mask = call.get("attention_mask")
    if mask is None:
        starts = torch.diff(positions, prepend=positions[:, :1] - 2, dim=-1) != 1
        edges = starts.flatten().nonzero().squeeze(1).tolist()
        lengths = [b - a for a, b in zip(edges, [*edges[1:], batch * width], strict=True)]
        places = torch.arange(batch * width, device=embeds.device)
    else:
        kept = _padding_mask(mask, (batch, width))
        lengths = [length for length in kept.sum(-1).tolist() if length]
        places = kept.flatten().nonzero().squeeze(1)
    if not lengths:
        raise DataError(
            "a batch has no token: attention_mask is all zeros. Leave such batches out."
        )
    # As transformers has it, angles that depend on a length depend on the longest of the call.
    own = torch.full_like(places, int(positions.max()) + 1)
    at = decoder.positions_at(positions.flatten()[places], self_segments(lengths), own)
    return Laid((batch, width), places, tuple(lengths), at)


def _padding_mask(mask: Any, shape: tuple[int, int]) -> Tensor:
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise DataError(
            f"attention_mask is {found}; expected one number for each token, {list(shape)}: 1, or "
            "0 for padding. For packed sequences leave it out and pass position_ids."
        )
    kept = mask.bool()
    runs = torch.diff(kept.int(), prepend=kept.new_zeros(shape[0], 1).int(), dim=-1) == 1
    if not bool(((mask == 0) | (mask == 1)).all()) or bool((runs.sum(-1) > 1).any()):
        raise DataError(
            "attention_mask has gaps within a row, or numbers other than 0 and 1; expected padding "
            "on the left or on the right only. For packed sequences leave it out and pass "
            "position_ids."
        )
    return kept


def targets_of_call(call: Mapping[str, Any], shape: tuple[int, int]) -> Tensor:
    """What each position must predict, `(B, S)`: labels shifted within each row.

    Args:
        call: arguments by name, with labels or shift_labels.
        shape: `(B, S)`.

    Returns:
        int64, -100 where there is none.

    Raises:
        DataError: they are of another shape.
    """
    name = "shift_labels" if "shift_labels" in call else "labels"
    labels: Tensor = call[name]
    if tuple(labels.shape) != shape:
        raise DataError(f"{name} are {list(labels.shape)}, and the tokens {list(shape)}.")
    if name == "shift_labels":
        return labels
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def batch_of(targets: Tensor, laid: Laid) -> Batch:
    """The labels of a call for lowtide's loss, which looks at nothing else of a batch.

    Args:
        targets: `(B, S)`.
        laid: the tokens.

    Returns:
        A batch without ids.

    Raises:
        DataError: a padding position has something to predict.
    """
    flat = targets.flatten()
    chosen = flat[laid.places]
    if int((flat != IGNORED).sum()) != int((chosen != IGNORED).sum()):
        raise DataError(
            "labels ask a padding position for a prediction: the first label of a row that is "
            "padded on the left, or labels on padding. Pad on the right "
            "(tokenizer.padding_side = 'right'), or set those labels to -100."
        )
    return Batch(torch.empty_like(chosen), chosen, laid.lengths)
