"""A plain forward for autograd: the same function, written to be read.

Nothing here is tiled or reused; full logits and full activations exist. It is the truth that the
structured pass is held against, and what `autograd` trains with. `mebp` runs the same blocks with
leaner `Kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowtide.ops.attention import Heads
from lowtide.ops.dropout import dropout_scale
from lowtide.ops.lora_linear import Lora
from lowtide.weights.matrix import StoredMatrix

from .adapter import Adapter
from .batch import IGNORED, Batch
from .decoder import Decoder
from .neftune import Noise
from .rope import rope_tables
from .spec import Projection, RopeSpec


class Kernels(NamedTuple):
    """The parts that can be had in less memory than plain autograd takes.

    Attributes:
        product: `x W^T` `(T, out)` of `x (T, in)` and a frozen W.
        attend: causal attention of one sequence, `(heads, T, head_dim)` each, keys and values
            repeated to as many heads as queries; `Heads` has scale, softcap and window.
        norms: `||W + s B A||` by row, `(out,)`, of W, A, B and s.
    """

    product: Callable[[Tensor, StoredMatrix], Tensor]
    attend: Callable[[Tensor, Tensor, Tensor, Heads], Tensor]
    norms: Callable[[StoredMatrix, Tensor, Tensor, float], Tensor]


def plain_product(x: Tensor, weight: StoredMatrix) -> Tensor:
    """With the whole weight widened; autograd keeps it for the backward."""
    return F.linear(x, weight.whole().to(x.dtype))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
    """With the whole score matrix."""
    scores = softcap(q @ k.transpose(1, 2) * heads.factor, heads.softcap)
    weights: Tensor = scores.masked_fill(~visible(q.shape[1], heads), float("-inf")).softmax(-1)
    return weights @ v


def softcap(x: Tensor, cap: float) -> Tensor:
    """`cap tanh(x / cap)`; x itself where cap is 0."""
    return cap * torch.tanh(x / cap) if cap else x


def visible(tokens: int, heads: Heads) -> Tensor:
    """`(T, T)` booleans: which keys (columns) each query sees."""
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return seen.triu(1 - heads.window) if heads.window else seen


def plain_norms(weight: StoredMatrix, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """With the whole of W + s B A."""
    norms: Tensor = torch.linalg.norm(weight.whole().to(a.dtype) + scale * (b @ a), dim=1)
    return norms


PLAIN = Kernels(plain_product, plain_attention, plain_norms)
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def reference_loss(
    model: Decoder,
    adapter: Adapter | None,
    batch: Batch,
    dropout_seed: int | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Sum of the labelled positions' losses, differentiable in the adapter's matrices."""
    logits = reference_logits(model, adapter, batch, dropout_seed, noise)
    return F.cross_entropy(logits, batch.targets, ignore_index=IGNORED, reduction="sum")


def reference_logits(
    model: Decoder,
    adapter: Adapter | None,
    batch: Batch,
    dropout_seed: int | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Logits `(T, V)` of every position."""
    dtype, spec = model.compute_dtype, model.spec
    x = F.embedding(batch.ids, model.embedding.whole()).to(dtype) * spec.embedding_scale
    if noise is not None:
        noise.add_(x, batch.lengths, spec)
    for layer in range(spec.num_layers):
        x = reference_block(model, adapter, layer, x, batch, dropout_seed)
    return reference_head(model, x, PLAIN)


def reference_head(model: Decoder, x: Tensor, kernels: Kernels) -> Tensor:
    """Logits `(T, V)` from the last block's output `x (T, H)`."""
    spec = model.spec
    logits = kernels.product(_norm(x, model.final_norm, spec.rms_norm_eps), model.head)
    return softcap(logits * spec.logit_scale, spec.logit_softcap)


def reference_block(
    model: Decoder,
    adapter: Adapter | None,
    layer: int,
    x: Tensor,
    batch: Batch,
    dropout_seed: int | None,
    kernels: Kernels = PLAIN,
) -> Tensor:
    """One block's output `(T, H)` from its input `(T, H)`."""
    spec, norms, heads = model.spec, model.norms[layer], model.spec.heads(layer)

    def linear(projection: Projection, value: Tensor) -> dict[str, Tensor]:
        """Outputs by role."""
        frozen = model.linears[layer][projection.name]
        y = kernels.product(value, frozen.weight)
        lora = None if adapter is None else adapter.lora(layer, projection.name, dropout_seed)
        if adapter is not None and lora is not None:
            m = adapter.magnitude(layer, projection.name)
            dropped = _dropped(value, lora)
            added = lora.scale * F.linear(F.linear(dropped, lora.a), lora.b)
            if m is None:
                y = y + added
            else:
                norm = kernels.norms(frozen.weight, lora.a.detach(), lora.b.detach(), lora.scale)
                base = y if dropped is value else kernels.product(dropped, frozen.weight)
                y = y + (m / norm - 1) * base + m / norm * added
        y = y if frozen.bias is None else y + frozen.bias
        widths = [spec.role_shape(role)[0] for role in projection.roles]
        return dict(zip(projection.roles, torch.split(y, widths, -1), strict=True))

    def outputs(value: Tensor, *roles: str) -> list[Tensor]:
        found: dict[str, Tensor] = {}
        for projection in spec.projections:
            if set(projection.roles) & set(roles):
                found |= linear(projection, value)
        return [found[role] for role in roles]

    def norm(value: Tensor, weight: Tensor | None) -> Tensor:
        return value if weight is None else _norm(value, weight, spec.rms_norm_eps)

    def on_heads(value: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return value
        return norm(value.view(len(value), -1, len(weight)), weight).flatten(1)

    q, k, v = outputs(norm(x, norms.before_attention), "q", "k", "v")
    q, k = on_heads(q, norms.q), on_heads(k, norms.k)
    (branch,) = outputs(_attention(model, layer, (q, k, v), batch, kernels, heads), "o")
    x = x + spec.residual_scale * norm(branch, norms.after_attention)
    gate, up = outputs(norm(x, norms.before_mlp), "gate", "up")
    (branch,) = outputs(_ACTIVATIONS[spec.activation](gate) * up, "down")
    return x + spec.residual_scale * norm(branch, norms.after_mlp)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _dropped(x: Tensor, lora: Lora) -> Tensor:
    return x * dropout_scale(x, lora.dropout, lora.seed) if lora.dropout > 0 else x


def _attention(
    model: Decoder,
    layer: int,
    qkv: Sequence[Tensor],
    batch: Batch,
    kernels: Kernels,
    heads: Heads,
) -> Tensor:
    """Causal attention of each sequence by itself, heads repeated."""
    outputs = []
    for q_i, k_i, v_i in zip(*(torch.split(t, list(batch.lengths)) for t in qkv), strict=True):
        queries, keys, values = (_heads(t, heads.dim) for t in (q_i, k_i, v_i))
        rope = model.spec.layers[layer].rope
        if rope is not None:
            tables = _tables(model.spec.ropes[rope], heads.dim, len(q_i), q_i.dtype)
            queries, keys = _rotate(queries, *tables), _rotate(keys, *tables)
        keys, values = (t.repeat_interleave(heads.group, 0) for t in (keys, values))
        attended = kernels.attend(queries, keys, values, heads)
        outputs.append(attended.transpose(0, 1).reshape(len(q_i), -1))
    return torch.cat(outputs)


def _tables(rope: RopeSpec, head_dim: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    lengths = torch.full((tokens,), tokens)
    return rope_tables(rope, head_dim, torch.arange(tokens), dtype, lengths)


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """`(T, heads * head_dim)` as `(heads, T, head_dim)`."""
    return x.view(len(x), -1, head_dim).transpose(0, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    x1, x2, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), -1)
