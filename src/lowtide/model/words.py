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
        ("unusual", "; ".join(_unusual(spec)) or "nothing"),
        (
            "layers",
            f"{spec.num_layers} of hidden size {spec.hidden_size:,}, intermediate size "
            f"{spec.intermediate_size:,}",
        ),
        ("attention", _attention(spec)),
        ("rotation", _ropes(spec)),
        ("norms", _norms(spec)),
        ("mlp", _MLP[spec.activation]),
        ("linears", ", ".join(name.split(".")[-1] for name in spec.linears) + _biases(spec)),
        *([("factors", ", ".join(factors))] if (factors := _factors(spec)) else []),
        ("vocabulary", f"{spec.vocab_size:,} tokens; the head {_head(spec)}"),
        ("context", f"{spec.max_positions:,} tokens"),
    ]


_MLP = {"silu": "SwiGLU", "gelu_tanh": "GeGLU, gelu by tanh"}


def _head(spec: ModelSpec) -> str:
    return "is the embedding" if spec.tied_head else "has weights of its own"


def _unusual(spec: ModelSpec) -> list[str]:
    """Where it differs from norms before each branch, full rotated attention and SwiGLU."""
    windows = sum(bool(layer.window) for layer in spec.layers)
    still = sum(layer.rope is None for layer in spec.layers)
    fused = [name.split(".")[-1] for name, roles in spec.projections if len(roles) > 1]
    found = {
        f"fused linears ({', '.join(fused)})": bool(fused),
        "biases": bool(spec.biased),
        f"norms {_places(spec.norms)}": spec.norms.after_attention is not None,
        "norms on q and k": spec.qk_norm is not None,
        f"norm weights that count from {spec.norm_offset:g}": spec.norm_offset != 0,
        "GeGLU": spec.activation != "silu",
        f"windows in {windows} of {spec.num_layers} layers": windows > 0,
        f"no rotation in {still} of {spec.num_layers} layers": still > 0,
        f"{len(spec.ropes)} rotary bases": len(spec.ropes) > 1,
        "heads rotated in part": any(rope.rotated for rope in spec.ropes),
        "frequencies scaled for long contexts": any(r.kind != "default" for r in spec.ropes),
        "capped scores or logits": bool(spec.attention_softcap or spec.logit_softcap),
        "factors on scores": spec.attention_scale not in (None, spec.head_dim**-0.5),
        "factors: " + ", ".join(_multipliers(spec)): any(_multipliers(spec)),
    }
    return [what for what, is_so in found.items() if is_so]


def _multipliers(spec: ModelSpec) -> list[str]:
    return [
        f"{what} times {factor:.6g}"
        for what, factor in (
            ("embeddings", spec.embedding_scale),
            ("branches", spec.residual_scale),
            ("logits", spec.logit_scale),
        )
        if factor != 1.0
    ]


def _biases(spec: ModelSpec) -> str:
    names = [name.split(".")[-1] for name in spec.linears if name in spec.biased]
    return f"; biases on {', '.join(names)}" if names else ""


def _attention(spec: ModelSpec) -> str:
    shared = f"{spec.num_kv_heads} of keys and values"
    text = f"{spec.num_heads} heads of {spec.head_dim}, {shared}"
    windows = Counter(layer.window for layer in spec.layers)
    full = windows.pop(0, 0)
    for window, count in windows.items():
        who = "each layer sees" if count == spec.num_layers else f"{_layers(count)} see"
        who += "s" if who == "1 layer see" else ""
        text += f"; {who} the last {window:,} tokens"
    if full and windows:
        text += f", {full} all"
    if spec.attention_softcap:
        text += f"; scores capped at {spec.attention_softcap:g}"
    if spec.attention_scale not in (None, spec.head_dim**-0.5):
        text += f"; scores times {spec.attention_scale:g}"
    return text


def _layers(count: int) -> str:
    return f"{count} layer{'s' if count != 1 else ''}"


def _rope(rope: RopeSpec) -> str:
    text = f"base {rope.theta:,.10g}"
    if rope.rotated:
        text += f", the first {rope.rotated} columns of each head"
    at = f"{rope.original_max_positions:,} tokens"
    return (
        text
        + {
            "default": "",
            "linear": f", all frequencies divided by {rope.factor:g}",
            "banded": f", low frequencies divided by {rope.factor:g} (trained up to {at})",
            "yarn": f", low frequencies divided by {rope.factor:g} (YaRN, trained up to {at})",
            "longrope": f", other frequencies in sequences beyond {at}",
        }[rope.kind]
    )


def _ropes(spec: ModelSpec) -> str:
    counts = Counter(layer.rope for layer in spec.layers)
    texts = []
    for place, rope in enumerate(spec.ropes):
        alone = counts[place] == spec.num_layers
        texts.append(_rope(rope) + ("" if alone else f" in {_layers(counts[place])}"))
    return "; ".join(texts) + (f"; none in {_layers(counts[None])}" if counts[None] else "")


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
    capped = [f"logits capped at {spec.logit_softcap:g}"] if spec.logit_softcap else []
    return _multipliers(spec) + capped
