"""Gradients over quantised weights are those of the model that has the dequantised weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import EPS32, random_adapter, random_batch, relative
from safetensors.torch import load_file, save_file

import lowtide as lt
from lowtide.methods import METHODS, MethodOptions
from lowtide.model.decoder import Decoder
from lowtide.model.quantized import quantize_model
from lowtide.weights.storages import STORAGES

FILE = "model.safetensors"
EXACT = [name for name, make in METHODS.items() if make(MethodOptions()).exact]
# A tied head, an untied one, biases everywhere, and several tiles of every kind.
SHAPES = ("qwen2-mqa", "qwen2-gqa3-untied", "llama-biases-llama3", "llama-many-tiles")


def dequantized(parts: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A matrix from what the file holds, column by column."""
    if f"{name}.int8" in parts:
        return parts[f"{name}.int8"].double() * parts[f"{name}.scales"].double()
    packed, scales = parts[f"{name}.int4"].int(), parts[f"{name}.scales"].double()
    zeros = parts.get(f"{name}.zeros")
    groups, half = scales.shape[1], packed.shape[1]
    size = half // -(-groups // 2)
    out = torch.empty(shape, dtype=torch.float64)
    for col in range(shape[1]):
        q = packed[:, col % half] >> (4 if col >= half else 0) & 15
        q = (q - 16 * (q >= 8)).double()
        if zeros is not None:
            q = q - zeros[:, col // size]
        out[:, col] = q * scales[:, col // size]
    return out


@pytest.fixture(scope="module")
def twins(
    odd_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Path, Path]]:
    """A quantised model, and one that stores its dequantised weights in float32, once each."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(shape: str, storage: str) -> tuple[Path, Path]:
        if (shape, storage) in made:
            return made[shape, storage]
        source = odd_model(shape)
        root = tmp_path_factory.mktemp(f"{shape}-{storage}")
        quantize_model(str(source), root / "quantized", storage)
        parts, plain = load_file(root / "quantized" / FILE), root / "plain"
        plain.mkdir()
        (plain / "config.json").write_bytes((source / "config.json").read_bytes())
        tensors = {}
        for name, tensor in load_file(source / FILE).items():
            tensors[name] = tensor
            if tensor.dim() == 2:
                exact = dequantized(parts, name, tuple(tensor.shape))
                tensors[name] = exact.float()
                assert tensors[name].double().equal(exact)
        save_file(tensors, plain / FILE, metadata={"format": "pt"})
        made[shape, storage] = root / "quantized", plain
        return made[shape, storage]

    return make


def flat(model: Decoder, adapter: lt.Adapter, batch: lt.Batch, method: str) -> torch.Tensor:
    """All gradients in one vector."""
    grads = lt.gradients(model, adapter, batch, method, dropout_seed=3).grads
    return torch.cat([g.double().flatten() for g in grads.values()])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_autograds_on_the_dequantised_weights(
    shape: str, storage: str, twins: Callable[[str, str], tuple[Path, Path]]
) -> None:
    ours, plain = (lt.load_model(path, "float64") for path in twins(shape, storage))
    adapter = random_adapter(plain, lt.LoraConfig(r=3, lora_dropout=0.2))
    batch = lt.Batch.from_sequences(*random_batch(131, [23, 1, 9, 31], masked=0.4))
    truth = lt.gradients(plain, adapter, batch, "autograd", dropout_seed=7)
    for method in EXACT:
        found = lt.gradients(ours, adapter, batch, method, dropout_seed=7)
        assert found.loss == pytest.approx(truth.loss, rel=1e-12), method
        assert max(relative(found.grads[n], g) for n, g in truth.grads.items()) < 1e-12, method
    ids = batch.ids[:9].tolist()
    assert relative(lt.logits(ours, adapter, ids), lt.logits(plain, adapter, ids)) < 1e-12


@pytest.mark.parametrize("storage", STORAGES)
def test_float32_is_as_near_the_truth_as_autograd_is(
    storage: str, twins: Callable[[str, str], tuple[Path, Path]]
) -> None:
    """The noise-floor rule over all gradients in one vector, with 16 eps to spare."""
    quantized, plain = twins("qwen2-gqa3-untied", storage)
    small = random_adapter(lt.load_model(plain), lt.LoraConfig(r=8))
    wide = lt.Adapter(small.config, {n: p.double() for n, p in small.items()})
    batch = lt.Batch.from_sequences(*random_batch(131, [23, 9], masked=0.4))
    truth = flat(lt.load_model(plain, "float64"), wide, batch, "autograd")
    naive = flat(lt.load_model(plain), small, batch, "autograd")
    for method in EXACT:
        ours = flat(lt.load_model(quantized), small, batch, method)
        assert relative(ours, truth) <= 2 * relative(naive, truth) + 16 * EPS32, method
