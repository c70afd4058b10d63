"""A `ModelSpec` in words, for people."""

from __future__ import annotations

from collections import Counter

from .spec import ModelSpec, NormNames, RopeSpec


def in_words(spec: ModelSpec) -> list[tuple[str, str]]:
    """What a model is, line by line.

    Args:
        spec: the model.

    Returns:
        (name, text) of each line.
    """
    return [
        (
            "layers",
            f"{spec.num_layers} of hidden size {spec.hidden_size}, intermediate size "
            f"{spec.intermediate_size}",
        ),
        ("attention", _attention(spec)),
        ("rope", _ropes(spec)),
        ("norms", _norms(spec)),
        ("mlp", {"silu": "SwiGLU", "gelu_tanh": "GeGLU, gelu by tanh"}[spec.activation]),
        ("linears", ", ".join(name.split(".")[-1] for name in spec.linears) + _biases(spec)),
        *([("factors", ", ".join(factors))] if (factors := _factors(spec)) else []),
        ("vocabulary", f"{spec.vocab_size:,}, head {'tied' if spec.tied_head else 'untied'}"),
        ("positions", f"{spec.max_positions:,}"),
    ]


def _biases(spec: ModelSpec) -> str:
    names = [name.split(".")[-1] for name in spec.linears if name in spec.biased]
    return f"; biases on {', '.join(sorted(names))}" if names else ""


def _attention(spec: ModelSpec) -> str:
    text = f"{spec.num_heads} heads of {spec.head_dim}, {spec.num_kv_heads} key/value heads"
    windows = Counter(layer.window for layer in spec.layers)
    full = windows.pop(0, 0)
    for window, count in windows.items():
        who = "each layer sees" if count == spec.num_layers else f"{count} layers see"
        text += f"; {who} the last {window:,} keys"
    if full and windows:
        text += f", {full} all"
    if spec.attention_softcap:
        text += f"; scores capped at {spec.attention_softcap:g}"
    if spec.attention_scale is not None:
        text += f"; scores times {spec.attention_scale:g}"
    return text


def _rope(rope: RopeSpec) -> str:
    text = f"{rope.kind}, theta {rope.theta:,.10g}"
    if rope.kind in ("linear", "banded"):
        text += f", factor {rope.factor:g}"
    if rope.rotated:
        text += f", {rope.rotated} columns of each head"
    if rope.depends_on_length:
        text += f", long factors beyond {rope.original_max_positions:,} tokens"
    return text


def _ropes(spec: ModelSpec) -> str:
    counts = Counter(layer.rope for layer in spec.layers)
    texts = []
    for place, rope in enumerate(spec.ropes):
        alone = counts[place] == spec.num_layers
        texts.append(_rope(rope) + ("" if alone else f" in {counts[place]} layers"))
    return "; ".join(texts) + (f"; none in {counts[None]} layers" if counts[None] else "")


def _norms(spec: ModelSpec) -> str:
    text = _places(spec.norms)
    if spec.qk_norm:
        text += {"head": ", on each head of q and k", "full": ", on q and k over all heads"}[
            spec.qk_norm
        ]
    if spec.norm_offset:
        text += f"; weights count from {spec.norm_offset:g}"
    return f"RMSNorm {text}; epsilon {spec.rms_norm_eps:g}"


def _places(norms: NormNames) -> str:
    before, after = norms.before_attention is not None, norms.after_attention is not None
    return {
        (True, False): "before attention and MLP",
        (True, True): "before and after attention and MLP",
        (False, True): "after attention and MLP, none before",
    }[before, after]


def _factors(spec: ModelSpec) -> list[str]:
    found = []
    for what, factor in (
        ("embeddings", spec.embedding_scale),
        ("branches", spec.residual_scale),
        ("logits", spec.logit_scale),
    ):
        if factor != 1.0:
            found.append(f"{what} times {factor:.6g}")
    if spec.logit_softcap:
        found.append(f"logits capped at {spec.logit_softcap:g}")
    return found
