"""Phi-3 and Phi-4-mini: q, k, v in one linear, gate and up in another; parts of heads rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowtide.model.gguf.entry import LONG_FACTORS, SHORT_FACTORS, Gguf, MetadataReader
from lowtide.model.spec import LayerSpec, ModelSpec, Projection

from .common import Family, decoder_spec, one_rope, read_sizes, tiny
from .reader import ConfigReader

FUSED = (
    Projection("self_attn.qkv_proj", ("q", "k", "v")),
    Projection("self_attn.o_proj", ("o",)),
    Projection("mlp.gate_up_proj", ("gate", "up")),
    Projection("mlp.down_proj", ("down",)),
)


def phi3_spec(raw: Mapping[str, Any]) -> ModelSpec:
    """Sequences beyond `original_max_position_embeddings` rotate with the long factors.

    It decides over that inside the rotary settings, also where it is missing and means 4,096.
    """
    reader = ConfigReader({"original_max_position_embeddings": 4096, **raw})
    reader.refuse_set("resid_pdrop", "embd_pdrop", "attention_bias", "mlp_bias", "lm_head_bias")
    for name in ("full_attn_mod", "interpolate_factor"):
        reader.refuse_unless(name, lambda v: v in (None, 1), "1")
    reader.know(["original_max_position_embeddings"])
    sizes = read_sizes(reader, max_positions=4096)
    window = reader.window()
    return decoder_spec(
        reader,
        sizes,
        ropes=one_rope(reader, sizes, partial=True),
        layers=[LayerSpec(window)] * sizes.num_layers,
        eps=1e-5,
        projections=FUSED,
    )


def _read(reader: MetadataReader) -> dict[str, Any]:
    """Files name the window that the model was trained with, though llama.cpp ignores it."""
    return {
        "sliding_window": int(reader.optional("attention.sliding_window")) or None,
        "original_max_position_embeddings": reader.integer(
            "rope.scaling.original_context_length", reader.integer("context_length")
        ),
    }


PHI3 = Family(
    phi3_spec,
    (
        # Longer than 16 tokens means the long factors, so tests meet both.
        tiny(
            model_type="phi3",
            hidden_size=40,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=10,
            partial_rotary_factor=0.6,
            original_max_position_embeddings=16,
            rope_scaling={
                "type": "longrope",
                "short_factor": [1.0, 1.1, 1.4],
                "long_factor": [1.3, 2.5, 6.0],
            },
        ),
        tiny(
            model_type="phi3",
            hidden_size=44,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=22,
            sliding_window=9,
            tie_word_embeddings=False,
        ),
    ),
    Gguf("phi3", "phi3", _read, square=True, rope_tensors=(SHORT_FACTORS, LONG_FACTORS)),
)
