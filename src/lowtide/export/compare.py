"""How far a merged model is from base + adapter, tensor by tensor: the merge undone on paper.

With W the base, W' the exact merged weight and M what the merged model holds, of each element

    units = |M - W'| / spacing      spacing: between numbers of M's dtype at max(|W'|, |W|)

A sum that was rounded once is within 0.5 units. Programs that form the products in float32 add up
to `(r + 4) eps32 c (|W| + s |B| |A|)`, c being DoRA's m / n; that and one spacing is what rounding
explains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowtide.errors import ModelError, listed
from lowtide.model.decoder import Decoder, load_model

from .merged import Merged
from .peft import open_adapter

_EPS32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Difference:
    """A tensor of a merged model against the base.

    Attributes:
        name: of the tensor.
        adapted: whether the adapter changes it.
        wrong: how many of its elements are further away than rounding explains: from base +
            adapter, or where there is no adapter on it, from the base rounded to the dtype.
        worst_units: the largest distance from base + adapter, in spacings of that dtype.
        update_error: norm of the distance over the norm of what the adapter changes; None where
            that is nothing.
    """

    name: str
    adapted: bool
    wrong: int
    worst_units: float
    update_error: float | None

    @property
    def problem(self) -> str | None:
        """What is wrong with the tensor, in words."""
        if not self.wrong:
            return None
        what = "base + adapter" if self.adapted else "the base, which it should be"
        return f"{self.name}: {self.wrong:,} elements are not {what}; {self.worst_units:,.4g} units"


def compare(
    merged: str | Path, base: str | Path, adapter_path: str | Path, quantize: str | None = None
) -> list[Difference]:
    """Compare every tensor of a merged model with base + adapter.

    Args:
        merged: the merged model, whatever program merged it.
        base: the model that it was merged into.
        adapter_path: a PEFT adapter directory.
        quantize: as in `merge`.

    Returns:
        The differences, in the model's order.

    Raises:
        ModelError: a model cannot be used, or they are not of the same shape.
        AdapterError: the adapter cannot be used, or does not fit the base.
    """
    held, decoder = load_model(merged, "float64"), load_model(base, "float64", quantize)
    if held.storages:
        raise ModelError(
            f"{merged} is quantised ({', '.join(held.storages)}), and its weights are nobody's "
            "sum any more. Compare the model that it was made of."
        )
    _refuse_other_shapes(held, decoder)
    adapter = open_adapter(Path(adapter_path).expanduser(), decoder)
    return list(_differences(Merged(held, None), Merged(decoder, adapter), held))


def _refuse_other_shapes(merged: Decoder, base: Decoder) -> None:
    ours, theirs = merged.spec.tensor_shapes(), base.spec.tensor_shapes()
    names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    if names:

        def shape(found: tuple[int, ...] | None) -> str:
            return "not there" if found is None else str(list(found))

        pairs = [
            f"{n}: {shape(ours.get(n))} merged, {shape(theirs.get(n))} in the base" for n in names
        ]
        raise ModelError(
            f"{merged.directory} was not merged from {base.directory}; their tensors differ:\n"
            f"{listed(pairs)}\nGive --model the model that it was merged from."
        )


def _differences(held: Merged, expected: Merged, model: Decoder) -> Iterator[Difference]:
    for name in expected.shapes:
        dtype = getattr(torch, model.checkpoint.stored_as(name))
        wrong, worst, error, update = 0, 0.0, 0.0, 0.0
        rounded = _EPS32 * (expected.rank(name) + 4)
        for ours, truth in zip(held.tiles(name), expected.tiles(name), strict=True):
            distance = (ours.base - truth.merged).abs_()
            one = spacing(torch.maximum(truth.merged.abs(), truth.base.abs()), dtype)
            if truth.merged is truth.base:
                wrong += int((ours.base != truth.base.to(dtype).double()).sum())
            else:
                allowed = one + rounded * expected.magnitude(name, truth)
                wrong += int((~(distance <= allowed)).sum())  # what is no number is wrong too
                update += float((truth.merged - truth.base).square_().sum())
            error += float(distance.square().sum())
            worst = max(worst, float((distance / one).max().nan_to_num_(math.inf, math.inf)))
        relative = math.sqrt(error / update) if update else None
        yield Difference(name, name in expected.adapted, wrong, worst, relative)


def spacing(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of a dtype at numbers of that size.

    Args:
        size: not negative, float64.
        dtype: a floating one.

    Returns:
        Powers of two.
    """
    info = torch.finfo(dtype)
    exponent = torch.frexp(size.clamp(min=info.tiny)).exponent.long() - 1
    return (exponent + 1023 << 52).view(torch.float64) * info.eps  # 2^exponent, by its bits
