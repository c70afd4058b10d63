"""Logits against transformers: real weights, odd shapes, every way a checkpoint is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    SHAPES,
    asset,
    float64_throughout,
    hf_logits,
    hf_model,
    random_batch,
    relative,
    write_model,
)

import lowtide as lt

TOKENS = 61
# Logits here are of order 1 to 10 and pass through a few blocks: float32 leaves about 1e-6.
FLOAT32 = 1e-4
# transformers keeps norms and softmax in float32 even in a float64 model: about 1e-7 each.
FLOAT64 = 1e-5
# With those in float64 too, only the rounding of float64 itself is left.
EXACT = 1e-11


def _ids(vocab_size: int, tokens: int = TOKENS) -> list[int]:
    return random_batch(vocab_size, [tokens])[0][0]


@pytest.mark.parametrize("name", SHAPES)
def test_odd_shapes_in_float32(name: str, odd_model: Callable[..., Path]) -> None:
    directory = odd_model(name)
    model = lt.load_model(directory)
    ids = _ids(model.spec.vocab_size)
    truth = hf_logits(hf_model(directory, torch.float32), ids)
    ours = lt.logits(model, None, ids)
    assert ours.dtype is torch.float32
    assert float((ours - truth).abs().max()) < FLOAT32
    assert float(truth.std()) > 0.3  # a flat function would hide anything


@pytest.mark.parametrize("name", SHAPES)
def test_odd_shapes_in_float64(name: str, odd_model: Callable[..., Path]) -> None:
    directory = odd_model(name)
    model = lt.load_model(directory, compute_dtype=torch.float64)
    ids = _ids(model.spec.vocab_size)
    reference = hf_model(directory, torch.float64)
    ours = lt.logits(model, None, ids)
    assert ours.dtype is torch.float64
    assert relative(ours, hf_logits(reference, ids)) < FLOAT64
    with float64_throughout():
        assert relative(ours, hf_logits(reference, ids)) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen2-gqa3-untied", "llama-many-tiles"])
def test_sixteen_bit_weights(name: str, dtype: torch.dtype, odd_model: Callable[..., Path]) -> None:
    directory = odd_model(name, dtype)
    model = lt.load_model(directory)
    assert model.stored_dtypes == [str(dtype).removeprefix("torch.")]
    ids = _ids(model.spec.vocab_size)
    truth = hf_logits(hf_model(directory, torch.float32), ids)
    assert float((lt.logits(model, None, ids) - truth).abs().max()) < FLOAT32


@pytest.mark.parametrize("twin", ["hf-llama", "hf-qwen2-zero-bias"])
def test_a_real_pretrained_model(twin: str) -> None:
    directory = asset(f"models/stories260K/{twin}")
    ids = [1, *_ids(512, 200)]
    truth = hf_logits(hf_model(directory, torch.float32), ids)
    ours = lt.logits(lt.load_model(directory), None, ids)
    assert float((ours - truth).abs().max()) < FLOAT32
    double = lt.logits(lt.load_model(directory, compute_dtype="float64"), None, ids)
    reference = hf_model(directory, torch.float64)
    assert relative(double, hf_logits(reference, ids)) < FLOAT64
    with float64_throughout():
        assert relative(double, hf_logits(reference, ids)) < EXACT


def test_shards_hold_the_same_model(tmp_path: Path, odd_model: Callable[..., Path]) -> None:
    shape = SHAPES["llama-biases-llama3"]
    write_model(tmp_path, shape, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole = lt.load_model(odd_model("llama-biases-llama3"))
    sharded = lt.load_model(tmp_path)
    ids = _ids(whole.spec.vocab_size)
    assert lt.logits(sharded, None, ids).equal(lt.logits(whole, None, ids))


def _respell(config: dict[str, Any], spelling: str) -> dict[str, Any]:
    """The rotary settings as files of different ages write them."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    if spelling == "rope_parameters":
        return {**config, "rope_parameters": rope}
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    config["rope_theta"] = theta
    key = "type" if spelling == "rope_scaling with type" else "rope_type"
    config["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    return config


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "rope_scaling with type"])
@pytest.mark.parametrize(
    "name", ["qwen2-gqa3-untied", "llama-biases-llama3", "llama-linear-untied"]
)
def test_both_spellings_of_the_rotary_settings(
    name: str, spelling: str, tmp_path: Path, odd_model: Callable[..., Path]
) -> None:
    shutil.copytree(odd_model(name), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_respell(json.loads(path.read_text()), spelling)))
    model = lt.load_model(tmp_path)
    ids = _ids(model.spec.vocab_size)
    truth = hf_logits(hf_model(odd_model(name), torch.float32), ids)
    assert float((lt.logits(model, None, ids) - truth).abs().max()) < FLOAT32


def test_the_rotary_settings_matter(tmp_path: Path, odd_model: Callable[..., Path]) -> None:
    """The llama3 test sees all branches of the rule: without it logits are elsewhere."""
    shutil.copytree(odd_model("llama-biases-llama3"), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e4}
    path.write_text(json.dumps(config))
    ids = _ids(config["vocab_size"])
    plain = lt.logits(lt.load_model(tmp_path), None, ids)
    scaled = lt.logits(lt.load_model(odd_model("llama-biases-llama3")), None, ids)
    assert float((plain - scaled).abs().max()) > 100 * FLOAT32


def test_one_token(odd_model: Callable[..., Path]) -> None:
    directory = odd_model("qwen2-mqa")
    truth = hf_logits(hf_model(directory, torch.float32), [7])
    ours = lt.logits(lt.load_model(directory), None, [7])
    assert float((ours - truth).abs().max()) < FLOAT32
