"""A plain forward for autograd: the same function, written to be read.

Nothing here is tiled or reused; full logits and full activations exist. It is the truth that the
structured pass is held against, and what `autograd` trains with. `mebp` runs the same blocks with
leaner `Kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowtide.ops.dropout import dropout_scale
from lowtide.ops.lora_linear import Lora
from lowtide.weights.matrix import StoredMatrix

from .adapter import Adapter
from .batch import IGNORED, Batch
from .decoder import Decoder
from .rope import rope_tables


class Kernels(NamedTuple):
    """The two parts that can be had in less memory than plain autograd takes.

    Attributes:
        product: `x W^T` `(T, out)` of `x (T, in)` and a frozen W.
        attend: causal attention of one sequence, `(heads, T, head_dim)` each, keys and values
            repeated to as many heads as queries.
    """

    product: Callable[[Tensor, StoredMatrix], Tensor]
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_product(x: Tensor, weight: StoredMatrix) -> Tensor:
    """With the whole weight widened; autograd keeps it for the backward."""
    return F.linear(x, weight.whole().to(x.dtype))


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With the whole score matrix."""
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    weights: Tensor = scores.masked_fill(future, float("-inf")).softmax(-1)
    return weights @ v


PLAIN = Kernels(plain_product, plain_attention)


def reference_loss(
    model: Decoder, adapter: Adapter | None, batch: Batch, dropout_seed: int | None = None
) -> Tensor:
    """Sum of the labelled positions' losses, differentiable in the adapter's matrices."""
    logits = reference_logits(model, adapter, batch, dropout_seed)
    return F.cross_entropy(logits, batch.targets, ignore_index=IGNORED, reduction="sum")


def reference_logits(
    model: Decoder, adapter: Adapter | None, batch: Batch, dropout_seed: int | None = None
) -> Tensor:
    """Logits `(T, V)` of every position."""
    dtype, spec = model.compute_dtype, model.spec
    x = F.embedding(batch.ids, model.embedding.whole()).to(dtype)
    for layer in range(spec.num_layers):
        x = reference_block(model, adapter, layer, x, batch, dropout_seed)
    return reference_head(model, x, PLAIN)


def reference_head(model: Decoder, x: Tensor, kernels: Kernels) -> Tensor:
    """Logits `(T, V)` from the last block's output `x (T, H)`."""
    return kernels.product(_norm(x, model.final_norm, model.spec.rms_norm_eps), model.head)


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
    spec = model.spec

    def linear(name: str, value: Tensor) -> Tensor:
        frozen = model.linears[layer][name]
        y = kernels.product(value, frozen.weight)
        y = y if frozen.bias is None else y + frozen.bias
        lora = None if adapter is None else adapter.lora(layer, name, dropout_seed)
        return y if lora is None else y + _lora(value, lora)

    input_norm, mlp_norm = model.norms[layer]
    n = _norm(x, input_norm, spec.rms_norm_eps)
    q, k, v = (linear(f"self_attn.{name}_proj", n) for name in "qkv")
    x = x + linear("self_attn.o_proj", _attention(model, q, k, v, batch, kernels))
    n = _norm(x, mlp_norm, spec.rms_norm_eps)
    act = F.silu(linear("mlp.gate_proj", n)) * linear("mlp.up_proj", n)
    return x + linear("mlp.down_proj", act)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _lora(x: Tensor, lora: Lora) -> Tensor:
    if lora.dropout > 0:
        x = x * dropout_scale(x, lora.dropout, lora.seed)
    return lora.scale * F.linear(F.linear(x, lora.a), lora.b)


def _attention(
    model: Decoder, q: Tensor, k: Tensor, v: Tensor, batch: Batch, kernels: Kernels
) -> Tensor:
    """Causal attention of each sequence by itself, heads repeated."""
    spec = model.spec
    outputs = []
    for q_i, k_i, v_i in zip(
        *(torch.split(t, list(batch.lengths)) for t in (q, k, v)), strict=True
    ):
        places = torch.arange(len(q_i))
        cos, sin = rope_tables(spec.rope, spec.head_dim, places, q.dtype)
        heads = [_heads(t, spec.head_dim) for t in (q_i, k_i, v_i)]
        queries, keys = _rotate(heads[0], cos, sin), _rotate(heads[1], cos, sin)
        group = spec.num_heads // spec.num_kv_heads
        keys, values = (t.repeat_interleave(group, 0) for t in (keys, heads[2]))
        attended = kernels.attend(queries, keys, values)
        outputs.append(attended.transpose(0, 1).reshape(len(q_i), -1))
    return torch.cat(outputs)


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """`(T, heads * head_dim)` as `(heads, T, head_dim)`."""
    return x.view(len(x), -1, head_dim).transpose(0, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)
