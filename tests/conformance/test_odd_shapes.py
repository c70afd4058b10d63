"""Shapes and settings that nobody wrote down: each family's examples, changed at random.

A change that the family does not know, or refuses, is left out; what remains is held to
transformers + peft and to the plain reference. hypothesis finds the smallest that fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from made_up import ALL
from safetensors.torch import load_file, save_file

import lowtide as lt
from lowtide.check.conformance import (
    Example,
    hf_logits,
    labels_of,
    peft_gradients,
    peft_model,
    random_adapter,
    random_ids,
    relative,
)
from lowtide.errors import ModelError
from lowtide.model.families import spec_from_config

LENGTHS = (19, 1, 7, 33)
# transformers keeps norms, angles and softmax in float32: 1e-7 each, and more where a hidden size
# of 2 or 4 leaves a norm next to nothing to divide by: then what such rounding may do is measured.
TRANSFORMERS, EXACT = 1e-4, 1e-9
ROPES: tuple[dict[str, Any], ...] = (
    {},
    {"rope_theta": 12345.0},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    {"rope_parameters": {"rope_type": "linear", "factor": 1.5, "rope_theta": 3e5}},
    {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.4,
            "truncate": False,
            "rope_theta": 5e4,
        }
    },
    {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
)


@st.composite
def changes(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Groups of fields, each taken whole or left out whole."""
    kv_heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 5))
    kinds = st.sampled_from(("full_attention", "sliding_attention"))
    window = draw(st.integers(2, 9))
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * draw(st.integers(2, 10)),
        "head_dim": 2 * draw(st.integers(1, 9)),
        "intermediate_size": draw(st.integers(1, 80)),
        "vocab_size": draw(st.integers(8, 200)),
        # The examples' lists are as long as their layers.
        "num_hidden_layers": layers,
        "layer_types": None,
        "no_rope_layers": None,
    }
    each = st.lists(kinds, min_size=layers, max_size=layers)
    return [
        sizes,
        {"tie_word_embeddings": draw(st.booleans())},
        {"attention_bias": draw(st.booleans())},
        {"mlp_bias": draw(st.booleans())},
        {"rms_norm_eps": draw(st.sampled_from((1e-6, 1e-5, 1e-3)))},
        {"sliding_window": draw(st.none() | st.just(window))},
        {"use_sliding_window": True, "sliding_window": window, "layer_types": draw(each)},
        {"sliding_window": window, "layer_types": draw(each)},
        {"sliding_window_pattern": draw(st.integers(1, 3))},
        {"query_pre_attn_scalar": draw(st.integers(1, 200))},
        {"partial_rotary_factor": 0.5},
        draw(st.sampled_from(ROPES)),
    ]


def changed(config: Mapping[str, Any], groups: list[dict[str, Any]], take: list[bool]) -> Any:
    """The config with those groups that the family takes."""
    for group, wanted in zip(groups, take, strict=True):
        inner = config.get("text_config")
        trial = {**config, **group}
        if inner is not None:
            trial = {**config, "text_config": {**inner, **group}}
        if wanted or group is groups[0]:
            try:
                spec_from_config(trial)
            except ModelError:
                continue
            config = trial
    return config


def compare(config: Mapping[str, Any], seed: int) -> None:
    """Logits and gradients of one random model."""
    try:
        Example(Path(), config).hf_config()
    except Exception:  # transformers refuses some that make sense, by errors of many kinds
        assume(False)
    with TemporaryDirectory() as scratch:
        try:
            example = Example.write(Path(scratch), config)
        except ZeroDivisionError:  # their dynamic angles of a head with two rotated columns
            assume(False)
        model = example.load()
        rows = random_ids(model.spec.vocab_size, LENGTHS, seed)
        truth = hf_logits(example.hf_model(torch.float64), rows[-1])
        assert relative(lt.logits(model, None, rows[-1]), truth) <= TRANSFORMERS
        adapter = random_adapter(model)
        adapter.save(Path(scratch) / "adapter")
        batch = lt.Batch.from_sequences(rows, labels_of(rows))
        ours = lt.gradients(model, adapter, batch).grads
        plain = lt.gradients(model, adapter, batch, "autograd").grads
        peft = peft_gradients(peft_model(example, Path(scratch) / "adapter", torch.float64), rows)
        assert set(peft) == set(ours)
        assert _relative(ours, plain) <= EXACT
        apart = _relative(ours, peft)
        assert apart <= TRANSFORMERS or apart <= 2 * _sensitivity(Path(scratch), example, batch)


def _sensitivity(scratch: Path, example: Example, batch: lt.Batch) -> float:
    """How far gradients move when weights move by some half a unit of float32, the most of four."""

    def grads() -> dict[str, torch.Tensor]:
        model = example.load()
        return lt.gradients(model, lt.Adapter.load(scratch / "adapter", model), batch).grads

    truth, moved = grads(), []
    (path,) = scratch.glob("*.safetensors")
    weights = load_file(path)
    for seed in range(4):
        torch.manual_seed(seed)
        noise = {name: 1 + 2**-24 * torch.randn(w.shape).double() for name, w in weights.items()}
        save_file({name: (w.double() * noise[name]).float() for name, w in weights.items()}, path)
        moved.append(_relative(grads(), truth))
    return max(moved)


def _relative(ours: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> float:
    """Over all parameters: of some, such as q's under one key, the gradient is exactly zero."""
    distance = math.hypot(*(float((ours[name] - grad).norm()) for name, grad in truth.items()))
    return distance / math.hypot(*(float(grad.norm()) for grad in truth.values()))


ANY = {
    "groups": changes(),
    "take": st.lists(st.booleans(), min_size=12, max_size=12),
    "seed": st.integers(0, 99),
}
USUAL = {"deadline": None, "derandomize": True, "database": None}


@given(**ANY)
@settings(max_examples=6, **USUAL, suppress_health_check=list(HealthCheck))
def test_random_shapes(
    family: str, groups: list[dict[str, Any]], take: list[bool], seed: int
) -> None:
    for config in ALL[family].examples[:1]:
        compare(changed(config, groups, take), seed)


@pytest.mark.slow
@given(**ANY)
@settings(max_examples=60, **USUAL, suppress_health_check=list(HealthCheck))
def test_many_random_shapes(
    family: str, groups: list[dict[str, Any]], take: list[bool], seed: int
) -> None:
    for config in ALL[family].examples:
        compare(changed(config, groups, take), seed)


def test_heads_wider_than_a_tile_of_the_mlp() -> None:
    """One row of o's matrix is longer than the MLP's tiles of so narrow a model."""
    config = {
        **ALL["llama"].examples[1],
        "head_dim": 256,
        "intermediate_size": 7,
        "hidden_size": 12,
    }
    compare({**config, "rope_scaling": None}, 0)
