"""Llama 2, 3, 3.1, 3.2 and what shares their config (SmolLM2, TinyLlama, Yi)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowtide.model.gguf.entry import FREQUENCY_FACTORS, Gguf
from lowtide.model.spec import SEPARATE, ModelSpec

from .common import Family, biased, decoder_spec, one_rope, read_sizes, tiny
from .reader import ConfigReader

ATTENTION, MLP = (
    [one.name for one in SEPARATE if one.name.startswith(part)] for part in ("self_attn", "mlp")
)


def llama_spec(raw: Mapping[str, Any]) -> ModelSpec:
    """`attention_bias` puts a bias on q, k, v and o; `mlp_bias` on gate, up and down."""
    reader = ConfigReader(raw)
    reader.refuse_set("rope_interleaved")
    reader.know(["is_llama_config"])
    sizes = read_sizes(reader, max_positions=2048)
    return decoder_spec(
        reader,
        sizes,
        ropes=one_rope(reader, sizes),
        biased=frozenset(
            biased(reader, "attention_bias", *ATTENTION) + biased(reader, "mlp_bias", *MLP)
        ),
    )


LLAMA_GGUF = Gguf(
    "llama",
    "llama",
    pairs=True,
    biases=("attention_bias", "mlp_bias"),
    rope_tensors=(FREQUENCY_FACTORS,),
)
LLAMA = Family(
    llama_spec,
    (
        tiny(
            model_type="llama",
            head_dim=10,
            attention_bias=True,
            mlp_bias=True,
            rope_theta=5e4,
            # With head_dim 10 and this base, wavelengths 6, 55 and 476 meet the rule's three
            # branches: below 128 / 4, between, above 128.
            rope_scaling={
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        ),
        tiny(
            model_type="llama",
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=22,
            tie_word_embeddings=False,
            rope_scaling={"type": "linear", "factor": 2.5},
        ),
    ),
    LLAMA_GGUF,
)
