"""Mistral: Llama whose every layer attends in a window (versions from 0.2 on have none)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowtide.model.spec import LayerSpec, ModelSpec

from .common import Family, decoder_spec, one_rope, read_sizes, tiny
from .llama import LLAMA_GGUF
from .reader import ConfigReader


def mistral_spec(raw: Mapping[str, Any]) -> ModelSpec:
    """A config without `sliding_window` means 4,096 keys; null means none."""
    reader = ConfigReader(raw)
    reader.refuse_unless("layer_types", lambda v: v is None, "none: all layers are alike")
    sizes = read_sizes(reader, max_positions=131_072, kv_heads=8)
    window = reader.window(4096)
    return decoder_spec(
        reader,
        sizes,
        ropes=one_rope(reader, sizes),
        layers=[LayerSpec(window)] * sizes.num_layers,
    )


MISTRAL = Family(
    mistral_spec,
    (
        tiny(model_type="mistral", sliding_window=5, rope_theta=1e6),
        tiny(
            model_type="mistral",
            hidden_size=40,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            sliding_window=None,
            tie_word_embeddings=False,
        ),
    ),
    LLAMA_GGUF,  # which knows no windows
)
