"""Rotary tables against transformers' own, on real settings and at positions far out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers import asset

from lowtide.model.families import spec_from_config
from lowtide.model.rope import inverse_frequencies, rope_tables


def _both(config: dict[str, Any], positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """cos and sin here, then transformers'."""
    from transformers import LlamaConfig, Qwen2Config
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    spec = spec_from_config(config)
    ours = rope_tables(spec.ropes[0], spec.head_dim, positions, torch.float32)
    kinds: dict[str, tuple[Any, Any]] = {
        "llama": (LlamaConfig, LlamaRotaryEmbedding),
        "qwen2": (Qwen2Config, Qwen2RotaryEmbedding),
    }
    make_config, make_rope = kinds[str(config["model_type"])]
    rope = make_rope(make_config(**config))
    cos, sin = rope(torch.zeros(1), positions.unsqueeze(0))
    half = spec.head_dim // 2
    return *ours, cos[0, :, :half], sin[0, :, :half]


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Llama-3.2-1B", "SmolLM2-135M"])
def test_real_settings(name: str) -> None:
    config = json.loads(asset(f"configs/{name}/config.json").read_text())
    positions = torch.cat([torch.arange(300), torch.tensor([8191, 8000, 4097])])
    cos, sin, their_cos, their_sin = _both(config, positions)
    # Angles are float32 on both sides; at position 8191 one rounding of theirs is 5e-4 radians, so
    # an exponent rounded otherwise would show.
    assert float((cos - their_cos).abs().max()) < 1e-6
    assert float((sin - their_sin).abs().max()) < 1e-6


def test_llama3_has_three_kinds_of_frequency() -> None:
    config = json.loads(asset("configs/Llama-3.2-1B/config.json").read_text())
    spec = spec_from_config(config)
    plain = spec_from_config({**config, "rope_scaling": None})
    ratio = inverse_frequencies(plain.ropes[0], 64) / inverse_frequencies(spec.ropes[0], 64)
    assert (ratio == 1).any()
    assert torch.isclose(ratio, torch.tensor(32.0)).any()
    assert ((ratio > 1.01) & (ratio < 31.9)).any()


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
        {"rope_type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 1.0},
        {
            "rope_type": "yarn",
            "factor": 16.0,
            "beta_fast": 24.0,
            "beta_slow": 3.0,
            "truncate": False,
        },
        {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5},
        {"rope_type": "linear", "factor": 3.0},
        {"type": "dynamic", "factor": 2.5},
    ],
    ids=str,
)
def test_scalings_for_long_contexts(scaling: dict[str, Any]) -> None:
    """On a real model's base and sizes; `dynamic` up to the positions that the model has."""
    config = json.loads(asset("configs/Qwen2.5-0.5B/config.json").read_text())
    positions = torch.cat([torch.arange(300), torch.tensor([8191, 8000, 4097])])
    plain = _both(config, positions)
    cos, sin, their_cos, their_sin = _both({**config, "rope_scaling": scaling}, positions)
    assert float((cos - their_cos).abs().max()) < 1e-6
    assert float((sin - their_sin).abs().max()) < 1e-6
    assert bool((cos - plain[0]).abs().max() > 0.1) == (scaling.get("type") != "dynamic")
