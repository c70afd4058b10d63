"""The least floating-point operations of a training step, counted from `ModelSpec`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .adapter import LoraConfig
from .spec import ModelSpec


def step_flops(spec: ModelSpec, config: LoraConfig, lengths: Sequence[int], n_labelled: int) -> int:
    """FLOPs of one exact step that recomputes each block from its input.

    Per token, with P the weight parameters of a block: 2 P forward; of blocks that a gradient
    passes through, which are those from the lowest adapted one up, 2 (P - P_down) recompute and 2 P
    input gradients, less 2 P_qkv in the lowest; the adapters' products; 4 H V per labelled token
    for the loss; attention as `2 d` per product, head and visible pair, two products forward, two
    again in the recompute and four more backward. Where a norm follows the MLP, its gradient needs
    the down product too. Keys outside a window are not visible.

    Args:
        spec: the model.
        config: the adapter.
        lengths: tokens of each sequence.
        n_labelled: positions with a label.

    Returns:
        FLOPs, a product of (m, k) and (k, n) counting 2 m k n.
    """
    tokens, trained = sum(lengths), config.trained_layers(spec)
    block = spec.linear_parameters()
    forward = 2 * block * spec.num_layers
    unneeded = 0 if spec.norms.after_mlp else spec.linear_parameters("down")
    recompute = 2 * (block - unneeded) * len(trained)
    backward = 2 * (block * len(trained) - spec.linear_parameters("q", "k", "v"))
    # h and its product with B: forward and recompute; dB, dh, dA and dh A: backward.
    lora = sum(rank * sum(spec.linear_shape(name)) for _, name, rank in config.adapted(spec))
    adapters = 8 * lora + _dora_flops(spec, config)
    attention = 0
    for number, layer in enumerate(spec.layers):
        pairs = sum(_visible_pairs(length, layer.window) for length in lengths)
        products = 2 + 2 + 4 if number in trained else 2
        attention += pairs * spec.num_heads * spec.head_dim * 2 * products
    loss = 4 * spec.hidden_size * spec.vocab_size * n_labelled
    once = 0
    if config.use_dora:  # W + s B A, for its norms
        once = sum(2 * r * math.prod(spec.linear_shape(n)) for _, n, r in config.adapted(spec))
    return tokens * (forward + recompute + backward + adapters) + attention + loss + once


def _dora_flops(spec: ModelSpec, config: LoraConfig) -> int:
    """Products with W that DoRA adds, per token.

    dm needs u once more, except of gate and up, whose columns the recompute forms anyway. With
    dropout there is a product on the input as dropped beside each one on the input itself.
    """
    if not config.use_dora:
        return 0
    linears = config.linears(spec)
    roles = [role for one in spec.projections if one.name in linears for role in one.roles]
    products = 0
    for role in roles:
        again = 0 if role in ("gate", "up") else 1
        beside = 0 if not config.lora_dropout else 2 if role == "down" else 3
        products += (again + beside) * spec.linear_parameters(role)
    return 2 * products * len(config.layers(spec))


def _visible_pairs(length: int, window: int) -> int:
    """Pairs of a query and a key that it sees, in one sequence."""
    full = min(length, window or length)
    return full * (full + 1) // 2 + (length - full) * full
