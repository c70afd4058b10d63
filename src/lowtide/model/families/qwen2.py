"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v, and windows where they are switched on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowtide.model.gguf.entry import Gguf
from lowtide.model.spec import ModelSpec

from .common import Family, decoder_spec, one_rope, read_sizes, switched_windows, tiny
from .reader import ConfigReader


def qwen2_spec(raw: Mapping[str, Any]) -> ModelSpec:
    """Layers from `max_window_layers` on slide, and only where `use_sliding_window` is true."""
    reader = ConfigReader(raw)
    reader.refuse_set("use_mrope")
    sizes = read_sizes(reader, max_positions=32_768, kv_heads=32)
    first = reader.count("max_window_layers", 28)
    return decoder_spec(
        reader,
        sizes,
        ropes=one_rope(reader, sizes),
        layers=switched_windows(reader, sizes, lambda layer: layer >= first, 4096),
        biased=frozenset(f"self_attn.{role}_proj" for role in "qkv"),
    )


QWEN2 = Family(
    qwen2_spec,
    (
        tiny(model_type="qwen2", rms_norm_eps=1e-6),
        tiny(
            model_type="qwen2",
            num_hidden_layers=3,
            hidden_size=54,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=10,
            tie_word_embeddings=False,
            rope_theta=1e6,
            use_sliding_window=True,
            sliding_window=7,
            max_window_layers=1,
        ),
    ),
    Gguf("qwen2", "qwen2", square=True),
)
