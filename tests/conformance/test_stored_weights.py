"""Every family's examples in every way that weights are stored and mapped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from twins import quantized_and_plain

import lowtide as lt
from lowtide.check.conformance import (
    LENGTHS,
    Example,
    hf_logits,
    labels_of,
    random_adapter,
    random_ids,
    relative,
)
from lowtide.methods import METHODS, MethodOptions
from lowtide.model.decoder import Decoder
from lowtide.model.families import FAMILIES
from lowtide.weights.storages import STORAGES

EXACT = [name for name, make in METHODS.items() if make(MethodOptions()).exact]


def batch_for(model: Decoder) -> lt.Batch:
    rows = random_ids(model.spec.vocab_size, LENGTHS)
    return lt.Batch.from_sequences(rows, labels_of(rows))


@pytest.mark.parametrize("storage", STORAGES)
def test_gradients_over_quantised_weights(example: Example, storage: str, tmp_path: Path) -> None:
    """They are autograd's on the dequantised weights, of fused projections and tied heads too."""
    ours, plain = (
        lt.load_model(path, "float64")
        for path in quantized_and_plain(example.directory, tmp_path, storage)
    )
    assert ours.stored_dtypes != plain.stored_dtypes
    adapter = random_adapter(plain, lt.LoraConfig(r=3, lora_alpha=16, lora_dropout=0.2))
    batch = batch_for(plain)
    truth = lt.gradients(plain, adapter, batch, "autograd", dropout_seed=7)
    for method in EXACT:
        found = lt.gradients(ours, adapter, batch, method, dropout_seed=7)
        assert found.loss == pytest.approx(truth.loss, rel=1e-12), method
        assert max(relative(found.grads[n], g) for n, g in truth.grads.items()) < 1e-9, method
    ids = batch.ids[:9].tolist()
    assert relative(lt.logits(ours, adapter, ids), lt.logits(plain, adapter, ids)) < 1e-12


def test_a_limit_on_resident_weights_changes_no_bit(example: Example) -> None:
    free = example.load(torch.float32)
    smallest = lt.load_model(example.directory, resident_weights="1GB").residency
    assert smallest is not None
    limited = lt.load_model(example.directory, resident_weights=smallest.smallest_limit)
    batch = batch_for(free)
    for method in METHODS:
        expected, found = (
            lt.gradients(model, random_adapter(model), batch, method, seed=3)
            for model in (free, limited)
        )
        assert found.loss == expected.loss, method
        assert all(g.equal(found.grads[name]) for name, g in expected.grads.items()), method


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_sixteen_bit_checkpoints_compute_as_transformers_in_float32(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    example = Example.write(tmp_path, FAMILIES[family].examples[0], dtype)
    model = example.load(torch.float32)
    assert model.stored_dtypes == [str(dtype).removeprefix("torch.")]
    (ids,) = random_ids(model.spec.vocab_size, [40])
    truth = hf_logits(example.hf_model(torch.float64), ids)
    ours = relative(lt.logits(model, None, ids), truth)
    assert ours <= 2 * relative(hf_logits(example.hf_model(torch.float32), ids), truth)
