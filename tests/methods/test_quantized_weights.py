"""Gradients over quantised weights are those of the model that has the dequantised weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import EPS32, random_adapter, random_batch, relative
from twins import quantized_and_plain

import lowtide as lt
from lowtide.methods import METHODS, MethodOptions
from lowtide.model.decoder import Decoder
from lowtide.weights.storages import STORAGES

EXACT = [name for name, make in METHODS.items() if make(MethodOptions()).exact]
# A tied head, an untied one, biases everywhere, and several tiles of every kind.
SHAPES = ("qwen2-mqa", "qwen2-gqa3-untied", "llama-biases-llama3", "llama-many-tiles")


@pytest.fixture(scope="module")
def twins(
    odd_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Path, Path]]:
    """A quantised model, and one that stores its dequantised weights in float32, once each."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(shape: str, storage: str) -> tuple[Path, Path]:
        if (shape, storage) in made:
            return made[shape, storage]
        root = tmp_path_factory.mktemp(f"{shape}-{storage}")
        made[shape, storage] = quantized_and_plain(odd_model(shape), root, storage)
        return made[shape, storage]

    return make


def flat(model: Decoder, adapter: lt.Adapter, batch: lt.Batch, method: str) -> torch.Tensor:
    """All gradients in one vector."""
    grads = lt.gradients(model, adapter, batch, method, dropout_seed=3).grads
    return torch.cat([g.double().flatten() for g in grads.values()])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dora", [False, True])
def test_gradients_are_autograds_on_the_dequantised_weights(
    shape: str, storage: str, dora: bool, twins: Callable[[str, str], tuple[Path, Path]]
) -> None:
    ours, plain = (lt.load_model(path, "float64") for path in twins(shape, storage))
    adapter = random_adapter(plain, lt.LoraConfig(r=3, lora_dropout=0.2, use_dora=dora))
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
