"""Granite: Llama with factors on embeddings, branches, scores and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowtide.model.gguf.entry import FREQUENCY_FACTORS, Gguf, MetadataReader
from lowtide.model.spec import ModelSpec

from .common import Family, biased, decoder_spec, one_rope, read_sizes, tiny
from .llama import ATTENTION, MLP
from .reader import ConfigReader


def granite_spec(raw: Mapping[str, Any]) -> ModelSpec:
    """`attention_multiplier` takes the place of one over the root of the head size."""
    reader = ConfigReader(raw)
    sizes = read_sizes(reader, max_positions=2048)
    return decoder_spec(
        reader,
        sizes,
        ropes=one_rope(reader, sizes),
        biased=frozenset(
            biased(reader, "attention_bias", *ATTENTION) + biased(reader, "mlp_bias", *MLP)
        ),
        attention_scale=reader.number("attention_multiplier", 1.0),
        embedding_scale=reader.number("embedding_multiplier", 1.0),
        noise_scale=reader.number("embedding_multiplier", 1.0),
        residual_scale=reader.number("residual_multiplier", 1.0),
        logit_scale=1.0 / reader.number("logits_scaling", 1.0),
    )


def _read(reader: MetadataReader) -> dict[str, Any]:
    """A file without a scale of scores means the usual one."""
    head_dim = reader.integer("attention.key_length", 1)
    return {
        "attention_multiplier": reader.optional("attention.scale") or head_dim**-0.5,
        "embedding_multiplier": reader.optional("embedding_scale") or 1.0,
        "residual_multiplier": reader.optional("residual_scale") or 1.0,
        "logits_scaling": reader.optional("logit_scale") or 1.0,
    }


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {
        "attention.scale": spec.heads(0).scale,
        "embedding_scale": spec.embedding_scale,
        "residual_scale": spec.residual_scale,
        "logit_scale": 1.0 / spec.logit_scale,
    }


GRANITE = Family(
    granite_spec,
    (
        tiny(
            model_type="granite",
            hidden_size=40,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=10,
            attention_multiplier=0.21,
            embedding_multiplier=3.5,
            residual_multiplier=0.22,
            logits_scaling=1.7,
        ),
        tiny(
            model_type="granite",
            hidden_size=66,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=22,
            attention_multiplier=0.4,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
        ),
    ),
    Gguf(
        "granite",
        "granite",
        _read,
        _write,
        pairs=True,
        biases=("attention_bias", "mlp_bias"),
        rope_tensors=(FREQUENCY_FACTORS,),
    ),
)
