"""Gemma 1, 2 and 3: norm weights count from one, GeGLU, scaled embeddings.

Gemma 2 adds norms after the branches, softcaps and windows on every other layer; Gemma 3 norms on
the heads of q and k, and windowed layers with a rotary base of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lowtide.errors import ModelError
from lowtide.model.gguf.entry import Gguf, MetadataReader
from lowtide.model.spec import SANDWICH_NORMS, LayerSpec, ModelSpec, RopeSpec

from .common import (
    GELU_TANH,
    Family,
    Sizes,
    biased,
    decoder_spec,
    one_rope,
    read_sizes,
    rotates_all,
    tiny,
)
from .llama import ATTENTION
from .reader import ConfigReader

_HEAD_DIM = 256


def _is_gelu_tanh(value: object) -> bool:
    return value in GELU_TANH


def _shared(sizes: Sizes) -> dict[str, Any]:
    """What the three have in common."""
    return {
        "tied": True,
        "norm_offset": 1.0,
        "activation": "gelu_tanh",
        "embedding_scale": math.sqrt(sizes.hidden_size),
    }


def _with_softcaps_and_windows(reader: ConfigReader, sizes: Sizes) -> dict[str, Any]:
    """What versions 2 and 3 have in common."""
    reader.refuse_unless("hidden_activation", _is_gelu_tanh, GELU_TANH[0])
    reader.refuse_unless("hidden_act", _is_gelu_tanh, GELU_TANH[0])
    return {
        **_shared(sizes),
        "norms": SANDWICH_NORMS,
        "attention_scale": reader.number("query_pre_attn_scalar", 256) ** -0.5,
        "biased": frozenset(biased(reader, "attention_bias", *ATTENTION)),
    }


def _windows(reader: ConfigReader, sizes: Sizes, pattern: int) -> list[int]:
    """The window of each layer; all slide but every `pattern`-th."""
    window = reader.window(4096)
    slides = reader.sliding(sizes.num_layers, lambda layer: (layer + 1) % pattern != 0)
    if any(slides) and not window:
        reader.problems.append("sliding_window is null, and some layers attend in a window")
    return [window if one else 0 for one in slides]


def gemma_spec(raw: Mapping[str, Any]) -> ModelSpec:
    """Gemma 1. Its older files say `gelu` and mean the tanh form."""
    reader = ConfigReader(raw)
    either = (*GELU_TANH, "gelu")
    reader.refuse_unless("hidden_act", lambda v: v in either, GELU_TANH[0])
    reader.refuse_unless("hidden_activation", lambda v: v is None or v in either, GELU_TANH[0])
    sizes = read_sizes(reader, max_positions=8192, head_dim=_HEAD_DIM, kv_heads=16)
    return decoder_spec(
        reader,
        sizes,
        ropes=one_rope(reader, sizes),
        biased=frozenset(biased(reader, "attention_bias", *ATTENTION)),
        **_shared(sizes),
    )


def gemma2_spec(raw: Mapping[str, Any]) -> ModelSpec:
    """Gemma 2: every layer but each second slides; scores and logits are capped."""
    reader = ConfigReader(raw)
    sizes = read_sizes(reader, max_positions=8192, head_dim=_HEAD_DIM, kv_heads=4)
    return decoder_spec(
        reader,
        sizes,
        ropes=one_rope(reader, sizes),
        layers=[LayerSpec(window) for window in _windows(reader, sizes, 2)],
        attention_softcap=reader.optional("attn_logit_softcapping", 50.0),
        logit_softcap=reader.optional("final_logit_softcapping", 30.0),
        **_with_softcaps_and_windows(reader, sizes),
    )


def _two_ropes(reader: ConfigReader, sizes: Sizes) -> tuple[RopeSpec, ...]:
    """The table of layers that see everything, then that of those that slide."""
    found = reader.ropes()
    nested = any(name in found for name in ("full_attention", "sliding_attention"))
    if not nested and reader.get("rope_parameters"):
        reader.problems.append(
            "rope_parameters has neither full_attention nor sliding_attention (expected an object "
            "for each; rope_scaling is about full_attention)"
        )
    whole = found.get("full_attention") if nested else found
    local = found.get("sliding_attention") if nested else {}
    bases = reader.number("rope_theta", 1e6), reader.number("rope_local_base_freq", 1e4)
    return tuple(
        reader.rope(sizes.max_positions, sizes.head_dim, base, rotates_all(reader, settings or {}))
        for base, settings in zip(bases, (whole, local), strict=True)
    )


def gemma3_text_spec(raw: Mapping[str, Any]) -> ModelSpec:
    """Gemma 3: all layers but each sixth slide, and rotate with a base of their own.

    transformers does not use `attn_logit_softcapping` here; a value is refused, as nobody can say
    which function was meant.
    """
    reader = ConfigReader(raw)
    reader.refuse_set("attn_logit_softcapping")
    sizes = read_sizes(reader, max_positions=131_072, head_dim=_HEAD_DIM, kv_heads=4)
    windows = _windows(reader, sizes, reader.integer("sliding_window_pattern", 6))
    return decoder_spec(
        reader,
        sizes,
        ropes=_two_ropes(reader, sizes),
        layers=[LayerSpec(window, 1 if window else 0) for window in windows],
        qk_norm="head",
        logit_softcap=reader.optional("final_logit_softcapping", 0.0),
        **_with_softcaps_and_windows(reader, sizes),
    )


def gemma3_spec(raw: Mapping[str, Any]) -> ModelSpec:
    """A Gemma 3 that says `gemma3` and holds text only: its fields may lie in `text_config`.

    Args:
        raw: a parsed config.json.

    Returns:
        The spec of the text model.

    Raises:
        ModelError: it has a vision tower.
    """
    if raw.get("vision_config"):
        raise ModelError(
            "this is Gemma 3 with a vision tower (model_type 'gemma3' with a vision_config): a "
            "multimodal model, and lowtide trains text decoders. Save its language model alone "
            "(Gemma3ForCausalLM, model_type 'gemma3_text'), or take the 1B model, which has none."
        )
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        return gemma3_text_spec(raw)
    outer = {name: value for name, value in raw.items() if name not in ("text_config", *text)}
    return gemma3_text_spec({**outer, **text, "model_type": raw["model_type"]})


def _read(reader: MetadataReader) -> dict[str, Any]:
    return {"hidden_act": GELU_TANH[0]}


def _scalar(reader: MetadataReader, widest: int) -> dict[str, Any]:
    """llama.cpp knows the scale of scores by the number of layers: the widest model's differs."""
    heads = reader.integer("attention.head_count", 1)
    usual = reader.integer("embedding_length", 1) // heads
    if reader.layers() != widest:
        usual = reader.integer("attention.key_length", usual)
    return {"query_pre_attn_scalar": usual}


def _read2(reader: MetadataReader) -> dict[str, Any]:
    """A file that does not say a cap means the family's."""
    return {
        **_scalar(reader, 46),
        "sliding_window": reader.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": reader.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": reader.number("final_logit_softcapping", 30.0),
    }


def _write2(spec: ModelSpec) -> dict[str, Any]:
    window = max(layer.window for layer in spec.layers)
    caps = {
        "attn_logit_softcapping": spec.attention_softcap,
        "final_logit_softcapping": spec.logit_softcap,
    }
    return {
        "attention.sliding_window": window or spec.max_positions,
        **{name: cap for name, cap in caps.items() if cap},
    }


def _read3(reader: MetadataReader) -> dict[str, Any]:
    """A file without a window has none."""
    window = int(reader.optional("attention.sliding_window"))
    layers = reader.layers()
    pattern = reader.integer("attention.sliding_window_pattern", 6)
    kinds = [bool(window) and (layer + 1) % pattern != 0 for layer in range(layers)]
    return {
        **_scalar(reader, 62),
        "sliding_window": window or None,
        "layer_types": ["sliding_attention" if one else "full_attention" for one in kinds],
        "rope_local_base_freq": reader.number("rope.freq_base_swa", 10_000.0),
        "final_logit_softcapping": reader.optional("final_logit_softcapping") or None,
    }


def _write3(spec: ModelSpec) -> dict[str, Any]:
    windows = [layer.window for layer in spec.layers]
    full = [layer for layer, window in enumerate(windows, 1) if not window]
    keys: dict[str, Any] = {"rope.freq_base_swa": spec.ropes[1].theta}
    if any(windows):
        keys["attention.sliding_window"] = max(windows)
        keys["attention.sliding_window_pattern"] = full[0] if full else len(windows) + 1
    if spec.logit_softcap:
        keys["final_logit_softcapping"] = spec.logit_softcap
    return keys


GEMMA3_GGUF = Gguf("gemma3", "gemma3_text", _read3, _write3)
GEMMA = Family(
    gemma_spec,
    (
        tiny(model_type="gemma", hidden_act="gelu_pytorch_tanh", head_dim=14),
        tiny(
            model_type="gemma",
            hidden_act="gelu",
            hidden_activation=None,
            hidden_size=40,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rope_theta=2e4,
        ),
    ),
    Gguf("gemma", "gemma", _read),
)
GEMMA2 = Family(
    gemma2_spec,
    (
        # Caps so low that they bend: scores and logits here are of order 1 to 10.
        tiny(
            model_type="gemma2",
            num_hidden_layers=3,
            query_pre_attn_scalar=9,
            sliding_window=7,
            attn_logit_softcapping=1.5,
            final_logit_softcapping=2.5,
        ),
        tiny(
            model_type="gemma2",
            hidden_size=40,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            query_pre_attn_scalar=24,
            sliding_window=64,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            layer_types=["full_attention", "sliding_attention"],
        ),
    ),
    Gguf("gemma2", "gemma2", _read2, _write2),
)
GEMMA3_TEXT = Family(
    gemma3_text_spec,
    (
        tiny(
            model_type="gemma3_text",
            num_hidden_layers=3,
            sliding_window_pattern=3,
            sliding_window=6,
            query_pre_attn_scalar=9,
            rope_theta=1e6,
            rope_local_base_freq=1e3,
            final_logit_softcapping=3.0,
        ),
        tiny(
            model_type="gemma3_text",
            hidden_size=40,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=17,
            tie_word_embeddings=False,
            layer_types=["sliding_attention", "full_attention"],
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
    ),
    GEMMA3_GGUF,
)
GEMMA3 = Family(
    gemma3_spec,
    (
        {
            "model_type": "gemma3",
            "vision_config": None,
            "text_config": tiny(
                model_type="gemma3_text",
                head_dim=12,
                sliding_window=5,
                sliding_window_pattern=2,
                query_pre_attn_scalar=20,
            ),
        },
    ),
    GEMMA3_GGUF,
)
