"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowtide.model.spec import ModelSpec

from .common import ConfigReader, decoder_spec


def qwen2_spec(raw: Mapping[str, Any]) -> ModelSpec:
    """Layers from `max_window_layers` on slide, and only where `use_sliding_window` is true."""
    reader = ConfigReader(raw)
    layers, first = raw.get("num_hidden_layers"), raw.get("max_window_layers", 28)
    none_slide = isinstance(layers, int) and isinstance(first, int) and first >= layers
    reader.refuse_unless(
        "use_sliding_window", lambda v: not v or none_slide, "false: no layer attends in a window"
    )
    reader.refuse_unless("use_mrope", lambda v: not v, "false")
    return decoder_spec(
        reader,
        biased=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        default_positions=32_768,
        known={"use_sliding_window", "sliding_window", "use_mrope"},
    )
