"""Gated MLP in tiles over the intermediate size: nothing `(T, I)` ever exists.

    G = n Wg^T + LoRA   U = n Wu^T + LoRA   act = f(G) * U   y += act Wd^T + LoRA

f is one of ACTIVATIONS: silu (SwiGLU) or the tanh form of gelu (GeGLU).

Each tile takes columns `[i, j)` of G, U and act: rows `[i, j)` of Wg, Wu and of their B, columns
`[i, j)` of Wd and of its A. Sums over tiles of `act A_d^T`, `dG B_g` and `dU B_u` give h_down and
the two dh exactly. The down product itself is not needed in the backward and is not recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .frozen import spans
from .lora_linear import (
    Emit,
    Linear,
    Lora,
    add_lora_input_gradient_,
    dropped,
    lora_h,
    to_rank,
    zeros_of_rank,
)
from .products import add_product_, product_


class Activation(NamedTuple):
    """An elementwise function: `forward(x, out=)`, and `backward(dy, x, grad_input=)`."""

    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor]


ACTIVATIONS = {
    "silu": Activation(torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input),
    "gelu_tanh": Activation(
        partial(torch.ops.aten.gelu.out, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh"),
    ),
}


class Glu(NamedTuple):
    """The three linears of the MLP, and which of ACTIVATIONS is between them."""

    gate: Linear
    up: Linear
    down: Linear
    activation: str = "silu"


class GluBuffers(NamedTuple):
    """Reused buffers: two flat weight tiles of `width * H`, four flat `T * width` activations."""

    tiles: Sequence[Tensor]
    activations: Sequence[Tensor]
    width: int


class Columns(NamedTuple):
    """G and U, each `(T, I)`, kept from the forward for the backward."""

    gate: Tensor
    up: Tensor


def _input_h(n: Tensor, lora: Lora | None) -> Tensor | None:
    """`h = D(n) A^T (T, r)` of an adapted gate or up projection."""
    return None if lora is None else lora_h(n, lora)


def _down_h(like: Tensor, lora: Lora) -> Tensor:
    """Zeros for `h_down (T, r)`, where it is kept if it is."""
    if lora.h is None:
        return zeros_of_rank(like.shape[0], like, lora.a.shape[0])
    return lora.h.zero_().t()


def _columns(
    n: Tensor, linear: Linear, h: Tensor | None, span: tuple[int, int], tile: Tensor, out: Tensor
) -> Tensor:
    """Columns `span` of `n W^T + b + s h B^T` into `out`; returns the widened tile of W."""
    start, stop = span
    weight = linear.weight.rows(start, stop, tile)
    product_(out, n, weight.t())
    if linear.bias is not None:
        out.add_(linear.bias[start:stop])
    if linear.lora is not None and h is not None:
        out.addmm_(h, linear.lora.b[start:stop].t(), alpha=linear.lora.scale)
    return weight


def glu_forward(
    n: Tensor, mlp: Glu, out: Tensor, buffers: GluBuffers, keep: Columns | None = None
) -> None:
    """`out += MLP(n)`.

    Args:
        n: `(T, H)`.
        mlp: the three linears; intermediate size I.
        out: `(T, H)`, added to: the residual is already there.
        buffers: see `GluBuffers`; the activations' first three are used.
        keep: overwritten with G and U; None where the backward recomputes them.
    """
    down = mlp.down.lora
    activate = ACTIVATIONS[mlp.activation].forward
    h_gate, h_up = _input_h(n, mlp.gate.lora), _input_h(n, mlp.up.lora)
    h_down = None if down is None else _down_h(n, down)
    activations = _Activations(buffers, n.shape[0], keep)
    for start, stop in spans(mlp.gate.weight.shape[0], buffers.width):
        gate, up, other, _ = activations(start, stop)
        _columns(n, mlp.gate, h_gate, (start, stop), buffers.tiles[0], gate)
        _columns(n, mlp.up, h_up, (start, stop), buffers.tiles[0], up)
        act = activate(gate, out=gate if keep is None else other).mul_(up)
        add_product_(out, act, mlp.down.weight.cols(start, stop, buffers.tiles[0]).t())
        if down is not None and h_down is not None:
            h_down.addmm_(dropped(act, down, start), down.a[:, start:stop].t())
    if mlp.down.bias is not None:
        out.add_(mlp.down.bias)
    if down is not None and h_down is not None:
        out.addmm_(h_down, down.b.t(), alpha=down.scale)


class _Branch:
    """Gradients of gate or up, summed over the tiles; dB is kept transposed, `(r, I)`."""

    def __init__(self, n: Tensor, linear: Linear) -> None:
        self.linear = linear
        self.h = _input_h(n, linear.lora)
        self.dh = self.db = None
        if linear.lora is not None and self.h is not None:
            self.dh = torch.zeros_like(self.h)
            self.db = torch.empty_like(linear.lora.b.t(), memory_format=torch.contiguous_format)

    def tile(self, dy: Tensor, start: int, stop: int) -> None:
        """Take this tile's output gradient `dy (T, stop - start)` into dB and dh."""
        lora = self.linear.lora
        if lora is None or self.dh is None or self.db is None or self.h is None:
            return
        torch.mm(self.h.t(), dy, out=self.db[:, start:stop]).mul_(lora.scale)
        self.dh.addmm_(dy, lora.b[start:stop], alpha=lora.scale)

    def finish(self, n: Tensor, dn: Tensor, emit: Emit) -> None:
        """Form dA, add the adapter's part of the input gradient to `dn`, emit."""
        lora = self.linear.lora
        if lora is None or self.dh is None or self.db is None:
            return
        da = self.dh.t() @ dropped(n, lora)
        add_lora_input_gradient_(dn, self.dh, lora)
        emit(da, self.db.t().contiguous())


class _Down:
    """Gradients of the down projection, whose input is formed tile by tile."""

    def __init__(self, dy: Tensor, lora: Lora | None) -> None:
        self.lora = lora
        if lora is not None:
            self.dh = to_rank(dy, lora.b).mul_(lora.scale)
            self.h = lora.h.t() if lora.h is not None else torch.zeros_like(self.dh)
            self.da = torch.empty_like(lora.a)

    def input_gradient(self, dact: Tensor, start: int) -> None:
        """`dact += D'(dh A_d[:, tile])`."""
        if self.lora is not None:
            add_lora_input_gradient_(dact, self.dh, self.lora, start)

    def tile(self, act: Tensor, start: int, stop: int) -> None:
        """Take the tile's activation `act (T, stop - start)` into h and dA."""
        if self.lora is not None:
            act_dropped = dropped(act, self.lora, start)
            if self.lora.h is None:
                self.h.addmm_(act_dropped, self.lora.a[:, start:stop].t())
            torch.mm(self.dh.t(), act_dropped, out=self.da[:, start:stop])

    def finish(self, dy: Tensor, emit: Emit) -> None:
        """Form dB and emit."""
        if self.lora is not None:
            emit(self.da, to_rank(dy.t(), self.h).contiguous().mul_(self.lora.scale))


class _Activations:
    """Four `(T, stop - start)` of a tile: the first two are for G and U, kept if they are."""

    def __init__(self, buffers: GluBuffers, tokens: int, kept: Columns | None) -> None:
        self._buffers, self._tokens, self._kept = buffers, tokens, kept
        self._of_width: dict[int, list[Tensor]] = {}  # thousands of views made once

    def __call__(self, start: int, stop: int) -> list[Tensor]:
        width = stop - start
        if width not in self._of_width:
            flat = [b[: self._tokens * width] for b in self._buffers.activations]
            self._of_width[width] = [b.view(self._tokens, width) for b in flat]
        parts = self._of_width[width]
        if self._kept is None:
            return parts
        return [*(whole[:, start:stop] for whole in self._kept), *parts[2:]]


def glu_backward(
    dy: Tensor,
    n: Tensor,
    mlp: Glu,
    dn: Tensor,
    buffers: GluBuffers,
    *,
    emits: Sequence[Emit],
    kept: Columns | None = None,
) -> None:
    """`dn = d MLP(n) / dn` applied to `dy`, recomputing each tile of G and U from `n`.

    Args:
        dy: `(T, H)`, gradient of the output.
        n: `(T, H)`, the forward's input; all that the backward needs of it.
        mlp: the three linears.
        dn: `(T, H)`, overwritten.
        buffers: see `GluBuffers`.
        emits: one per linear (gate, up, down), called with its (dA, dB).
        kept: G and U of the forward instead of recomputing them; overwritten.
    """
    dn.zero_()
    activate, activate_backward = ACTIVATIONS[mlp.activation]
    gate_grads, up_grads = _Branch(n, mlp.gate), _Branch(n, mlp.up)
    down_grads = _Down(dy, mlp.down.lora)
    activations = _Activations(buffers, n.shape[0], kept)
    for start, stop in spans(mlp.gate.weight.shape[0], buffers.width):
        gate, up, other, dact = activations(start, stop)
        # First, so that the down projection's tile is free again for the gate's.
        product_(dact, dy, mlp.down.weight.cols(start, stop, buffers.tiles[0]))
        down_grads.input_gradient(dact, start)
        if kept is None:
            w_gate = _columns(n, mlp.gate, gate_grads.h, (start, stop), buffers.tiles[0], gate)
            w_up = _columns(n, mlp.up, up_grads.h, (start, stop), buffers.tiles[1], up)
        else:
            w_gate = mlp.gate.weight.rows(start, stop, buffers.tiles[0])
            w_up = mlp.up.weight.rows(start, stop, buffers.tiles[1])
        down_grads.tile(activate(gate, out=other).mul_(up), start, stop)
        d_f = torch.mul(dact, up, out=other)
        d_up = activate(gate, out=up).mul_(dact)  # cheaper than a fifth buffer
        d_gate = activate_backward(d_f, gate, grad_input=dact)
        up_grads.tile(d_up, start, stop)
        gate_grads.tile(d_gate, start, stop)
        add_product_(add_product_(dn, d_gate, w_gate), d_up, w_up)
    down_grads.finish(dy, emits[2])
    up_grads.finish(n, dn, emits[1])
    gate_grads.finish(n, dn, emits[0])
