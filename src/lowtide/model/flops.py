"""The least floating-point operations of a training step, counted from `ModelSpec`."""

from __future__ import annotations

from collections.abc import Sequence

from .adapter import LoraConfig
from .spec import ModelSpec


def step_flops(spec: ModelSpec, config: LoraConfig, lengths: Sequence[int], n_labelled: int) -> int:
    """FLOPs of one exact step that recomputes each block from its input.

    Per token, with P the weight parameters of a block: 2 P forward, 2 (P - P_down) recompute,
    2 P input gradients, less 2 P_qkv in the first block; LoRA's products; 4 H V per labelled token
    for the loss; attention as `2 d` per product, head and visible pair, two products forward, two
    again in the recompute and five backward, less what the recompute shares with them. Where a norm
    follows the MLP, its gradient needs the down product too. Keys outside a window are not visible.

    Args:
        spec: the model.
        config: the adapter.
        lengths: tokens of each sequence.
        n_labelled: positions with a label.

    Returns:
        FLOPs, a product of (m, k) and (k, n) counting 2 m k n.
    """
    tokens, layers = sum(lengths), spec.num_layers
    block = spec.linear_parameters()
    forward = 2 * block * layers
    unneeded = 0 if spec.norms.after_mlp else spec.linear_parameters("down")
    recompute = 2 * (block - unneeded) * layers
    backward = 2 * (block * layers - spec.linear_parameters("q", "k", "v"))
    # h and its product with B: forward and recompute; dB, dh, dA and dh A: backward.
    lora = sum(sum(spec.linear_shape(name)) for name in config.linears(spec)) * config.r
    adapters = (2 * lora * 2 + 2 * lora * 2) * layers
    pairs = sum(_visible_pairs(length, layer.window) for layer in spec.layers for length in lengths)
    attention = pairs * spec.num_heads * spec.head_dim * 2 * (2 + 2 + 4)
    loss = 4 * spec.hidden_size * spec.vocab_size * n_labelled
    return tokens * (forward + recompute + backward + adapters) + attention + loss


def _visible_pairs(length: int, window: int) -> int:
    """Pairs of a query and a key that it sees, in one sequence."""
    full = min(length, window or length)
    return full * (full + 1) // 2 + (length - full) * full
