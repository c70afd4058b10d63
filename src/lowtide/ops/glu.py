"""Gated MLP in tiles over the intermediate size: nothing `(T, I)` ever exists.

    G = n Wg^T + LoRA   U = n Wu^T + LoRA   act = f(G) * U   y += act Wd^T + LoRA

f is one of ACTIVATIONS: silu (SwiGLU) or the tanh form of gelu (GeGLU).

Each tile takes columns `[i, j)` of G, U and act: rows `[i, j)` of Wg, Wu and of their B, columns
`[i, j)` of Wd and of its A. Sums over tiles of `act A_d^T`, `dG B_g` and `dU B_u` give h_down and
the two dh exactly. The down product itself is not needed in the backward and is not recomputed.

With magnitudes (DoRA, `lora_linear.py`), gate and up form the tile's u and from it their columns;
down sums u over the tiles, in the forward where the output is and in the backward, for dm, apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .frozen import spans
from .glu_sides import DownGradients, DownSum, Input, InputGradients
from .lora_linear import Emit, Linear


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
    """G and U, each `(T, I)`, kept from the forward for the backward; their u under DoRA."""

    gate: Tensor
    up: Tensor


def glu_forward(
    n: Tensor, mlp: Glu, out: Tensor, buffers: GluBuffers, keep: Columns | None = None
) -> None:
    """`out += MLP(n)`.

    Args:
        n: `(T, H)`.
        mlp: the three linears; intermediate size I.
        out: `(T, H)`, added to: the residual is already there. With a magnitude on down, zeros.
        buffers: see `GluBuffers`; the last of the activations is used under DoRA only.
        keep: overwritten with G and U; None where the backward recomputes them.
    """
    activate = ACTIVATIONS[mlp.activation].forward
    gate_input, up_input, down = Input(n, mlp.gate), Input(n, mlp.up), DownSum(out, n, mlp.down)
    activations = _Activations(buffers, n.shape[0], keep)
    for start, stop in spans(mlp.gate.weight.shape[0], buffers.width):
        u_gate, u_up, other, fourth = activations(start, stop)
        # What is kept of a linear with a magnitude is its u.
        gate = u_gate if keep is None or gate_input.factor is None else other
        up = u_up if keep is None or up_input.factor is None else fourth
        gate_input.columns((start, stop), buffers.tiles[0], gate, u_gate)
        up_input.columns((start, stop), buffers.tiles[0], up, u_up)
        act = activate(gate, out=gate if keep is None else other).mul_(up)
        down.add(act, mlp.down.weight.cols(start, stop, buffers.tiles[0]), start)
    down.finish()


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
        emits: one per linear (gate, up, down), called with its (dA, dB), and dm under DoRA.
        kept: G and U of the forward instead of recomputing them; overwritten.
    """
    dn.zero_()
    activate, activate_backward = ACTIVATIONS[mlp.activation]
    gate_grads, up_grads = InputGradients(n, mlp.gate), InputGradients(n, mlp.up)
    down_grads = DownGradients(dy, mlp.down)
    rooms = [branch.room(buffers.activations[0]) for branch in (gate_grads, up_grads)]
    # Under DoRA the down projection's tile is needed once more when its input is there.
    apart = mlp.down.magnitude is not None
    down_tile = torch.empty_like(buffers.tiles[0]) if apart else buffers.tiles[0]
    activations = _Activations(buffers, n.shape[0], kept)
    for start, stop in spans(mlp.gate.weight.shape[0], buffers.width):
        span = start, stop
        u_gate, u_up, other, dact = activations(start, stop)
        gate, up = (
            u if room is None else room[: u.numel()].view(u.shape)
            for u, room in zip((u_gate, u_up), rooms, strict=True)
        )
        # First, so that the down projection's tile is free again for the gate's.
        w_down = mlp.down.weight.cols(start, stop, down_tile)
        down_grads.input_gradient(w_down, start, dact)
        formed = kept is not None
        w_gate = gate_grads.columns(span, buffers.tiles[0], gate, u_gate, formed)
        w_up = up_grads.columns(span, buffers.tiles[1], up, u_up, formed)
        down_grads.tile(activate(gate, out=other).mul_(up), w_down, start)
        d_f = torch.mul(dact, up, out=other)
        d_up = activate(gate, out=up).mul_(dact)  # cheaper than a fifth buffer
        d_gate = activate_backward(d_f, gate, grad_input=dact)
        gate_grads.tile(d_gate, u_gate, w_gate, span, dn)
        up_grads.tile(d_up, u_up, w_up, span, dn)
    down_grads.finish(emits[2])
    up_grads.finish(dn, emits[1])
    gate_grads.finish(dn, emits[0])
