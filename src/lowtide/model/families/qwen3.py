"""Qwen3: RMSNorms on each head of q and k before rotation, and a head size of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowtide.model.gguf.entry import Gguf
from lowtide.model.spec import ModelSpec

from .common import Family, biased, decoder_spec, one_rope, read_sizes, switched_windows, tiny
from .llama import ATTENTION
from .reader import ConfigReader


def qwen3_spec(raw: Mapping[str, Any]) -> ModelSpec:
    """Windows as in Qwen2; `attention_bias` puts a bias on q, k, v and o."""
    reader = ConfigReader(raw)
    sizes = read_sizes(reader, max_positions=32_768, head_dim=128, kv_heads=32)
    first = reader.count("max_window_layers", 28)
    return decoder_spec(
        reader,
        sizes,
        ropes=one_rope(reader, sizes),
        layers=switched_windows(reader, sizes, lambda layer: layer >= first, 4096),
        biased=frozenset(biased(reader, "attention_bias", *ATTENTION)),
        qk_norm="head",
    )


QWEN3 = Family(
    qwen3_spec,
    (
        tiny(model_type="qwen3", head_dim=14),
        tiny(
            model_type="qwen3",
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=22,
            attention_bias=True,
            tie_word_embeddings=False,
            use_sliding_window=True,
            sliding_window=11,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            rope_scaling={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        ),
    ),
    Gguf("qwen3", "qwen3"),
)
