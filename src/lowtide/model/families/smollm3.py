"""SmolLM3: Llama where every fourth layer does not rotate q and k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowtide.model.gguf.entry import Gguf
from lowtide.model.spec import ModelSpec

from .common import Family, biased, decoder_spec, one_rope, read_sizes, switched_windows, tiny
from .llama import ATTENTION, MLP
from .reader import ConfigReader


def smollm3_spec(raw: Mapping[str, Any]) -> ModelSpec:
    """`no_rope_layers` has a 1 for each layer that rotates, despite its name."""
    reader = ConfigReader(raw)
    sizes = read_sizes(reader, max_positions=32_768, kv_heads=4)
    interval = reader.integer("no_rope_layer_interval", 4)
    rotates = reader.flags("no_rope_layers", sizes.num_layers)
    if rotates is None:
        rotates = [(layer + 1) % interval != 0 for layer in range(sizes.num_layers)]
    layers = switched_windows(reader, sizes, lambda layer: not rotates[layer])
    return decoder_spec(
        reader,
        sizes,
        ropes=one_rope(reader, sizes, 2e6),
        layers=[
            layer._replace(rope=0 if rotated else None)
            for layer, rotated in zip(layers, rotates, strict=True)
        ],
        tied=True,
        biased=frozenset(
            biased(reader, "attention_bias", *ATTENTION) + biased(reader, "mlp_bias", *MLP)
        ),
    )


SMOLLM3 = Family(
    smollm3_spec,
    (
        tiny(
            model_type="smollm3",
            num_hidden_layers=4,
            hidden_size=40,
            num_attention_heads=5,
            head_dim=8,
        ),
        tiny(
            model_type="smollm3",
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            no_rope_layers=[0, 1, 0],
            use_sliding_window=True,
            sliding_window=8,
            tie_word_embeddings=False,
            rope_scaling={"type": "dynamic", "factor": 2.0},
        ),
    ),
    Gguf("smollm3", "smollm3", pairs=True),  # where every fourth layer does not rotate
)
