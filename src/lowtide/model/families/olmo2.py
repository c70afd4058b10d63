"""OLMo 2: norms after the branches only, and norms over all heads of q and of k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowtide.model.gguf.entry import Gguf
from lowtide.model.spec import POST_NORMS, ModelSpec

from .common import Family, biased, decoder_spec, one_rope, read_sizes, tiny
from .llama import ATTENTION
from .reader import ConfigReader


def olmo2_spec(raw: Mapping[str, Any]) -> ModelSpec:
    """The residual stream itself is what q, k, v, gate and up read."""
    reader = ConfigReader(raw)
    reader.refuse_set("clip_qkv")
    sizes = read_sizes(reader, max_positions=2048)
    return decoder_spec(
        reader,
        sizes,
        ropes=one_rope(reader, sizes),
        eps=1e-5,
        biased=frozenset(biased(reader, "attention_bias", *ATTENTION)),
        norms=POST_NORMS,
        qk_norm="full",
    )


OLMO2 = Family(
    olmo2_spec,
    (
        tiny(model_type="olmo2", hidden_size=40, num_attention_heads=5, head_dim=8),
        tiny(
            model_type="olmo2",
            hidden_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            attention_bias=True,
            tie_word_embeddings=False,
            rope_theta=5e5,
        ),
    ),
    Gguf("olmo2", "olmo2", square=True, needs_head=True),
)
