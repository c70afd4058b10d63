"""The linears of a gated MLP on one tile of its columns after another: what `glu.py` is made of.

Gate and up give columns of their output, down sums over columns of its input; each side knows what
its adapter adds, LoRA or DoRA, and sums its gradients until the last tile is done.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dora import column_dots
from .lora_linear import (
    Emit,
    Linear,
    Lora,
    add_lora_input_gradient_,
    add_undropped_,
    dropped,
    lora_h,
    to_rank,
    zeros_of_rank,
)
from .products import add_product_, product_


class Input:
    """Gate or up on its input n `(T, H)`: h, and under DoRA the factor c and `D(n)`."""

    def __init__(self, n: Tensor, linear: Linear) -> None:
        self.n, self.linear = n, linear
        self.h = None if linear.lora is None else lora_h(n, linear.lora)
        self.factor: Tensor | None = None
        self.dropped = n
        if linear.lora is not None and linear.magnitude is not None:
            self.factor = linear.magnitude.factor
            self.dropped = dropped(n, linear.lora)

    def columns(
        self,
        span: tuple[int, int],
        tile: Tensor,
        out: Tensor,
        raw: Tensor,
        formed: bool = False,
    ) -> Tensor:
        """This span's columns of the output.

        Args:
            span: which columns.
            tile: for the widened rows of W.
            out: `(T, stop - start)`, overwritten.
            raw: takes u under DoRA; may be `out`. Without, `out` itself.
            formed: whether what `raw` takes is there already.

        Returns:
            The widened rows of W.
        """
        start, stop = span
        weight = self.linear.weight.rows(start, stop, tile)
        factor = self.factor
        if not formed:
            product_(raw, self.dropped, weight.t())
            self._add_lora(raw, span)
        if factor is not None:
            lossless = self.dropped is self.n
            torch.mul(raw, factor[start:stop] - (0.0 if lossless else 1.0), out=out)
            if not lossless:
                add_product_(out, self.n, weight.t())
                self._add_lora(out, span)
        if self.linear.bias is not None and (factor is not None or not formed):
            out.add_(self.linear.bias[start:stop])
        return weight

    def _add_lora(self, out: Tensor, span: tuple[int, int]) -> None:
        if self.linear.lora is not None and self.h is not None:
            b = self.linear.lora.b[slice(*span)]
            out.addmm_(self.h, b.t(), alpha=self.linear.lora.scale)


class InputGradients(Input):
    """Gradients of gate or up, summed over the tiles; dB is kept transposed, `(r, I)`."""

    def __init__(self, n: Tensor, linear: Linear) -> None:
        super().__init__(n, linear)
        self.dh = self.db = self.b = self.dfactor = self.d_dropped = None
        lora = linear.lora
        if lora is None or self.h is None:
            return
        self.dh = torch.zeros_like(self.h)
        self.db = torch.empty_like(lora.b.t(), memory_format=torch.contiguous_format)
        self.b = lora.b
        if self.factor is not None:
            self.b = lora.b * self.factor.unsqueeze(1)
            self.dfactor = torch.empty_like(self.factor)
            if lora.dropout > 0.0:
                self.d_dropped = torch.zeros_like(n)

    def room(self, like: Tensor) -> Tensor | None:
        """Where the columns go that are not u: nowhere without a magnitude."""
        return None if self.factor is None else torch.empty_like(like)

    def tile(
        self, dy: Tensor, u: Tensor, weight: Tensor, span: tuple[int, int], dn: Tensor
    ) -> None:
        """Take a tile's output gradient into dB, dh, dn and dm.

        Args:
            dy: `(T, stop - start)`, overwritten.
            u: what `columns` gave as `raw`.
            weight: the widened rows of W.
            span: which columns.
            dn: `(T, H)`, added to.
        """
        lora, (start, stop) = self.linear.lora, span
        if lora is not None and self.dh is not None and self.db is not None and self.b is not None:
            assert self.h is not None
            torch.mm(self.h.t(), dy, out=self.db[:, start:stop]).mul_(lora.scale)
            self.dh.addmm_(dy, self.b[start:stop], alpha=lora.scale)
        if self.factor is None or self.dfactor is None:
            add_product_(dn, dy, weight)
            return
        self.dfactor[start:stop] = column_dots(dy, u)
        if self.d_dropped is None:
            add_product_(dn, dy.mul_(self.factor[start:stop]), weight)
        else:
            add_product_(dn, dy, weight)
            add_product_(self.d_dropped, dy.mul_(self.factor[start:stop] - 1.0), weight)

    def finish(self, dn: Tensor, emit: Emit) -> None:
        """Form dA, add the adapter's part of the input gradient to `dn`, emit."""
        lora, magnitude = self.linear.lora, self.linear.magnitude
        if lora is None or self.dh is None or self.db is None:
            return
        x = self.dropped if magnitude is not None else dropped(self.n, lora)
        da = self.dh.t() @ x
        if self.d_dropped is None:
            add_lora_input_gradient_(dn, self.dh, lora)
        else:
            add_undropped_(dn, self.d_dropped.addmm_(self.dh, lora.a), lora)
        if self.factor is None or self.dfactor is None or magnitude is None:
            emit(da, self.db.t().contiguous())
        else:
            db = self.db.mul_(self.factor).t().contiguous()
            emit(da, db, self.dfactor.div_(magnitude.norm))


class DownSum:
    """The down projection, summed over tiles of its input into `out (T, H)`."""

    def __init__(self, out: Tensor, n: Tensor, linear: Linear) -> None:
        self.out, self.linear, self.lora = out, linear, linear.lora
        self.h = None if self.lora is None else _down_h(n, self.lora)
        self.u = out
        if self.lora is not None and linear.magnitude is not None and self.lora.dropout > 0.0:
            self.u = torch.zeros_like(out)

    def add(self, act: Tensor, weight: Tensor, start: int) -> None:
        """Take a tile: `act (T, n)` and `weight (H, n)`, the columns of W from `start` on."""
        add_product_(self.out, act, weight.t())
        if self.lora is None or self.h is None:
            return
        act_dropped = dropped(act, self.lora, start)
        self.h.addmm_(act_dropped, self.lora.a[:, start : start + act.shape[1]].t())
        if self.u is not self.out:
            add_product_(self.u, act_dropped, weight.t())

    def finish(self) -> None:
        """Add what is not a sum over tiles."""
        if self.lora is not None and self.h is not None:
            self.out.addmm_(self.h, self.lora.b.t(), alpha=self.lora.scale)
            if self.u is not self.out:
                self.u.addmm_(self.h, self.lora.b.t(), alpha=self.lora.scale)
        magnitude = self.linear.magnitude
        if magnitude is not None and self.u is self.out:
            self.out.mul_(magnitude.factor)
        elif magnitude is not None:
            self.out.addcmul_(self.u, magnitude.factor - 1.0)
        if self.linear.bias is not None:
            self.out.add_(self.linear.bias)


def _down_h(like: Tensor, lora: Lora) -> Tensor:
    """Zeros for `h_down (T, r)`, where it is kept if it is."""
    if lora.h is None:
        return zeros_of_rank(like.shape[0], like, lora.a.shape[0])
    return lora.h.zero_().t()


class DownGradients:
    """Gradients of the down projection, whose input is formed tile by tile."""

    def __init__(self, dy: Tensor, linear: Linear) -> None:
        self.dy, self.lora, self.magnitude = dy, linear.lora, linear.magnitude
        self.g = dy
        if self.lora is None:
            return
        b = self.lora.b
        if self.magnitude is not None:
            factor = self.magnitude.factor
            b = b * factor.unsqueeze(1)
            self.g = dy * (factor if self.lora.dropout == 0.0 else factor - 1.0)
            self.u = torch.zeros_like(dy)
        self.dh = to_rank(dy, b).mul_(self.lora.scale)
        self.h = self.lora.h.t() if self.lora.h is not None else torch.zeros_like(self.dh)
        self.da = torch.empty_like(self.lora.a)

    def input_gradient(self, weight: Tensor, start: int, out: Tensor) -> None:
        """`out = dact`, from the columns of W `(H, n)` from `start` on."""
        lora = self.lora
        if lora is None or self.magnitude is None or lora.dropout == 0.0:
            product_(out, self.g, weight)
            if lora is not None:
                add_lora_input_gradient_(out, self.dh, lora, start)
            return
        product_(out, self.dy, weight)
        d_dropped = self.g @ weight
        d_dropped.addmm_(self.dh, lora.a[:, start : start + out.shape[1]])
        add_undropped_(out, d_dropped, lora, start)

    def tile(self, act: Tensor, weight: Tensor, start: int) -> None:
        """Take the tile's activation `act (T, n)` into h and dA, and under DoRA into u."""
        if self.lora is None:
            return
        stop = start + act.shape[1]
        act_dropped = dropped(act, self.lora, start)
        if self.lora.h is None:
            self.h.addmm_(act_dropped, self.lora.a[:, start:stop].t())
        torch.mm(self.dh.t(), act_dropped, out=self.da[:, start:stop])
        if self.magnitude is not None:
            add_product_(self.u, act_dropped, weight.t())

    def finish(self, emit: Emit) -> None:
        """Form dB, and dm under DoRA, and emit."""
        lora = self.lora
        if lora is None:
            return
        db = to_rank(self.dy.t(), self.h).contiguous().mul_(lora.scale)
        if self.magnitude is None:
            emit(self.da, db)
            return
        dfactor = column_dots(self.dy, self.u).add_((db * lora.b).sum(1))
        db.mul_(self.magnitude.factor.unsqueeze(1))
        emit(self.da, db, dfactor.div_(self.magnitude.norm))
