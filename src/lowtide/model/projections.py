"""Projections of a block by role: fused ones as rows of one stored matrix, under one adapter.

A fused projection stays one matrix in the file; q, k, v or gate and up see their rows of it. Its
adapter is one A and one B (and m, under DoRA) over all its rows, so that with h = x A^T

    y_role = x W_role^T + s h B_role^T      dA = sum over roles of dh_role^T x      dB = [dB_role]

h is formed once for all roles, and the gradients are handed out when the last role has given its.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lowtide.ops.dora import Magnitude
from lowtide.ops.frozen import FrozenMatrix
from lowtide.ops.lora_linear import Emit, Linear, Lora, lora_h

from .spec import ModelSpec, Projection


class Rows:
    """Rows `[start, stop)` of a frozen matrix, as a frozen matrix; nothing is copied."""

    def __init__(self, whole: FrozenMatrix, start: int, stop: int) -> None:
        """Wrap `whole`, which tells its watch what is read."""
        self._whole, self._start, self._stop = whole, start, stop

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self._stop - self._start, self._whole.shape[1]

    def rows(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        """`W[start:stop]`, `(stop - start, in)`, in the compute dtype."""
        return self._whole.rows(self._start + start, self._start + stop, buffer)

    def cols(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        """`W[:, start:stop]`, `(out, stop - start)`, in the compute dtype."""
        return self._whole.cols(start, stop, buffer)[self._start : self._stop]

    def take(self, indices: Tensor, out: Tensor) -> None:
        """`out = W[indices]`."""
        self._whole.take(indices + self._start, out)

    def rows_per_tile(self, buffer: Tensor) -> int:
        """How many rows one call of `rows` may ask for with this buffer."""
        return self._whole.rows_per_tile(buffer)


def by_role(spec: ModelSpec, projections: Mapping[str, Linear]) -> dict[str, Linear]:
    """The linears of a block by role.

    Args:
        spec: the model.
        projections: linears by the names of the spec's projections.

    Returns:
        A linear for each role; those of a fused projection share its matrix, its A, and views of
        its bias and B.
    """
    parts: dict[str, Linear] = {}
    for name, roles in spec.projections:
        whole, start = projections[name], 0
        if len(roles) == 1:
            parts[roles[0]] = whole
            continue
        for role in roles:
            stop = start + spec.role_shape(role)[0]
            bias = None if whole.bias is None else whole.bias[start:stop]
            lora = whole.lora and _rows_of(whole.lora, start, stop)
            parts[role] = Linear(Rows(whole.weight, start, stop), bias, lora)
            start = stop
    return parts


def _rows_of(lora: Lora, start: int, stop: int) -> Lora:
    """The adapter on rows `[start, stop)` of its matrix."""
    magnitude = lora.magnitude
    if magnitude is not None:
        magnitude = Magnitude(*(part[start:stop] for part in magnitude))
    return lora._replace(b=lora.b[start:stop], magnitude=magnitude)


def with_one_h(x: Tensor, linears: Sequence[Linear]) -> list[Linear]:
    """Linears on the same input; where they share an adapter, its h is formed here, once.

    Args:
        x: `(T, in)`.
        linears: all of one projection, or of as many projections as there are linears.

    Returns:
        The same linears, h in those that share it.
    """
    first = linears[0].lora
    if first is None or any(one.lora is None or one.lora.a is not first.a for one in linears):
        return list(linears)
    h = lora_h(x, first).t()
    return [one._replace(lora=one.lora and one.lora._replace(h=h, h_ready=True)) for one in linears]


class Gradients:
    """Takes gradients of a block by role, and hands them out by projection."""

    def __init__(self, projections: Sequence[Projection], emit: Callable[..., None]) -> None:
        """`emit` is called with (projection's name, dA, dB), and dm under DoRA."""
        self._of = {role: one for one in projections for role in one.roles}
        self._emit = emit
        self._held: dict[str, tuple[Tensor, dict[str, tuple[Tensor, ...]]]] = {}

    def of(self, role: str) -> Emit:
        """What takes the (dA, dB), or (dA, dB, dm), of a role."""
        return lambda da, *by_row: self._take(role, da, by_row)

    def _take(self, role: str, da: Tensor, by_row: tuple[Tensor, ...]) -> None:
        """dA is a sum over the roles of a projection; dB and dm have rows of each."""
        name, roles = self._of[role]
        if len(roles) == 1:
            self._emit(name, da, *by_row)
            return
        total, rows = self._held.setdefault(name, (da, {}))
        if rows:
            total.add_(da)
        rows[role] = by_row
        if len(rows) == len(roles):
            del self._held[name]
            in_order = (rows.pop(each) for each in roles)
            self._emit(name, total, *(torch.cat(parts) for parts in zip(*in_order, strict=True)))
