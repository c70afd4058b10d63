"""RMSNorm: `y = w * x * rstd`, `rstd = (mean(x^2) + eps)^(-1/2)` (arXiv 1910.07467).

With `g = w * dy` the input gradient is `dx = rstd * g - x * rstd^3 * mean(g * x)`. The weight is
frozen, so it has no gradient. Only `rstd (T, 1)` is saved.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rmsnorm_forward(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """Write the normalised rows to `out` and return what the backward needs.

    Args:
        x: `(T, H)`.
        weight: `(H,)`.
        eps: added to the mean square.
        out: `(T, H)`, overwritten; must not overlap `x`.

    Returns:
        `rstd (T, 1)`: T elements.
    """
    torch.mul(x, x, out=out)
    rstd = out.mean(-1, keepdim=True).add_(eps).rsqrt_()
    torch.mul(x, rstd, out=out)
    out.mul_(weight)
    return rstd


def rmsnorm_backward_(
    dx: Tensor, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, scratch: Tensor
) -> None:
    """Add the input gradient to `dx`; `dy` is consumed (overwritten).

    Args:
        dx: `(T, H)`, added to: the residual path's gradient is already there.
        dy: `(T, H)`, overwritten with `w * dy`.
        x: `(T, H)`, the forward's input.
        weight: `(H,)`.
        rstd: `(T, 1)` from the forward.
        scratch: `(T, H)`, overwritten.
    """
    g = dy.mul_(weight)
    torch.mul(g, x, out=scratch)
    slope = scratch.mean(-1, keepdim=True).mul_(rstd).mul_(rstd).mul_(rstd)
    dx.addcmul_(g, rstd)
    dx.addcmul_(x, slope, value=-1.0)


def rmsnorm_gradient(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, out: Tensor) -> None:
    """Write the input gradient to `out`; needs no scratch, and leaves all else as it was.

    Args:
        dy: `(T, H)`.
        x: `(T, H)`, the forward's input.
        weight: `(H,)`.
        rstd: `(T, 1)` from the forward.
        out: `(T, H)`, overwritten; may be `dy`.
    """
    torch.mul(dy, weight, out=out)
    slope = torch.einsum("th,th->t", out, x).unsqueeze(1).mul_(rstd**3 / x.shape[1])
    out.mul_(rstd).addcmul_(x, slope, value=-1.0)
