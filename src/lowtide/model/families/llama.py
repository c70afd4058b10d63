"""Llama 2, 3, 3.1, 3.2 and what shares their config (SmolLM2, TinyLlama)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowtide.model.spec import LINEARS, ModelSpec

from .common import ConfigReader, decoder_spec


def llama_spec(raw: Mapping[str, Any]) -> ModelSpec:
    """`attention_bias` puts a bias on q, k, v and o; `mlp_bias` on gate, up and down."""
    reader = ConfigReader(raw)
    biased: list[str] = []
    if reader.flag("attention_bias", False):
        biased += [name for name in LINEARS if name.startswith("self_attn.")]
    if reader.flag("mlp_bias", False):
        biased += [name for name in LINEARS if name.startswith("mlp.")]
    reader.refuse_unless("rope_interleaved", lambda v: not v, "false")
    return decoder_spec(
        reader,
        biased=biased,
        default_positions=2048,
        known={"attention_bias", "mlp_bias", "rope_interleaved", "is_llama_config"},
    )
