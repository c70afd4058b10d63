"""What a checkpoint must hold, and how each way of being broken is told."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPES, random_batch, write_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowtide as lt
from lowtide.errors import ModelError

NAME = "qwen2-mqa"
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def directory(odd_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a good model, to be broken."""
    return Path(shutil.copytree(odd_model(NAME), tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_model(tmp_path / "sharded", SHAPES[NAME], max_shard_size="20KB")


def _refusal(directory: Path) -> str:
    with pytest.raises(ModelError) as error:
        lt.load_model(directory)
    assert error.value.exit_code == 2
    return str(error.value)


def _rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / FILE).items()}
    change(tensors)
    save_file(tensors, directory / FILE, metadata={"format": "pt"})


def _with_header(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header in place and leave the data as it is."""
    raw = (directory / FILE).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    (directory / FILE).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


@pytest.mark.parametrize("kept", [0, 7, 8, 100, 0.5, -1])
def test_a_truncated_file(kept: float, directory: Path) -> None:
    whole = (directory / FILE).read_bytes()
    size = int(len(whole) * kept) if isinstance(kept, float) else kept
    (directory / FILE).write_bytes(whole[:size])
    message = _refusal(directory)
    assert str(directory / FILE) in message
    assert f"({len(whole[:size]):,} bytes) cannot be read" in message
    assert "truncated or corrupt; download it again" in message


def test_a_header_that_lies_about_its_own_size(directory: Path) -> None:
    raw = (directory / FILE).read_bytes()
    for size in (2**63, len(raw), 1):
        (directory / FILE).write_bytes(struct.pack("<Q", size) + raw[8:])
        assert "truncated or corrupt" in _refusal(directory)


def test_a_header_that_lies_about_a_tensor(directory: Path) -> None:
    def longer(header: dict[str, Any]) -> None:
        header["model.norm.weight"]["shape"] = [4500]

    def beyond(header: dict[str, Any]) -> None:
        header["model.norm.weight"]["data_offsets"][1] += 2**40

    def overlapping(header: dict[str, Any]) -> None:
        header["model.norm.weight"]["data_offsets"] = header["model.embed_tokens.weight"][
            "data_offsets"
        ]

    good = (directory / FILE).read_bytes()
    for lie in (longer, beyond, overlapping):
        (directory / FILE).write_bytes(good)
        _with_header(directory, lie)
        assert "truncated or corrupt" in _refusal(directory)


def test_random_bytes_are_no_checkpoint(directory: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (5000,), generator=generator, dtype=torch.uint8)
    (directory / FILE).write_bytes(bytes(noise.tolist()))
    assert "truncated or corrupt" in _refusal(directory)


def test_everything_that_does_not_fit_is_listed_at_once(directory: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        del tensors["model.layers.0.self_attn.q_proj.bias"]
        tensors["model.norm.weight"] = torch.ones(44)
        tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(74, 45)
        tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(45)
        tensors["model.layers.2.input_layernorm.weight"] = torch.zeros(45)
        tensors["model.layers.1.mlp.gate_proj.weight"] = torch.zeros(74, 45, dtype=torch.int8)

    _rewrite(directory, change)
    message = _refusal(directory)
    for problem in (
        "missing: model.layers.1.mlp.up_proj.weight [74, 45]",
        "missing: model.layers.0.self_attn.q_proj.bias [30]",
        "wrong shape: model.norm.weight is [44], config.json asks for [45]",
        "wrong shape: model.layers.0.mlp.down_proj.weight is [74, 45], config.json asks for",
        "extra: model.layers.0.self_attn.o_proj.bias [45]",
        "extra: model.layers.2.input_layernorm.weight [45]",
        "dtype int8: model.layers.1.mlp.gate_proj.weight",
    ):
        assert problem in message
    assert "Check that config.json and the weights come from the same model" in message


def test_known_extras_are_accepted(directory: Path) -> None:
    ids = random_batch(131, [9])[0][0]
    before = lt.logits(lt.load_model(directory), None, ids)

    def change(tensors: dict[str, Tensor]) -> None:
        # A tied model has no use for a head of its own, and transformers ignores one too.
        tensors["lm_head.weight"] = torch.zeros(131, 45)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)

    _rewrite(directory, change)
    assert lt.logits(lt.load_model(directory), None, ids).equal(before)


def test_an_untied_model_needs_its_head(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": False}))
    assert "missing: lm_head.weight [131, 45]" in _refusal(directory)


def test_a_missing_shard(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    shards[1].unlink()
    message = _refusal(sharded)
    assert f"lacks 1 of {len(shards)} weight files" in message
    assert shards[1].name in message


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "sub/one.safetensors"])
def test_an_index_that_points_outside_its_directory(name: str, sharded: Path) -> None:
    path = sharded / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "evil.safetensors")
    message = _refusal(sharded)
    assert "names files outside its directory" in message
    assert name in message


def test_an_index_that_promises_more_than_its_files_hold(sharded: Path) -> None:
    path = sharded / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.7.extra"] = index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    message = _refusal(sharded)
    assert "promises tensors that its files do not hold" in message
    assert "model.layers.7.extra" in message


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_a_broken_index(text: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(text)
    assert "is not a safetensors index" in _refusal(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_unread(name: str, directory: Path) -> None:
    (directory / FILE).unlink()
    # Unpickling this would raise another kind of error; nobody tries.
    (directory / name).write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    message = _refusal(directory)
    assert f"holds pickled weights ({name})" in message
    assert "safe_serialization=True" in message


def test_no_weights_at_all(directory: Path) -> None:
    (directory / FILE).rename(directory / "other.safetensors")
    message = _refusal(directory)
    assert f"has no {FILE} and no {INDEX} (found only other.safetensors)" in message


def test_directories_that_are_no_model(tmp_path: Path, directory: Path) -> None:
    assert "does not exist" in _refusal(tmp_path / "nowhere")
    assert "is a file" in _refusal(directory / FILE)
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in _refusal(tmp_path / "empty")
    with pytest.raises(ModelError, match="empty path"):
        lt.load_model("")
    for text, found in (("{", "is not valid JSON"), ("[]", "holds list, not an object")):
        (directory / "config.json").write_text(text)
        assert found in _refusal(directory)
