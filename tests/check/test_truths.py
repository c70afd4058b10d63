"""Which truth is taken for how much memory, and that its memory is predicted right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import random_adapter, random_batch
from torch import Tensor

import lowtide as lt
from lowtide.check import run
from lowtide.check.fits import autograd_bytes, choose_truth, truths
from lowtide.errors import ConfigError
from lowtide.model.decoder import Decoder
from lowtide.model.reference import reference_loss


@pytest.fixture
def batch() -> lt.Batch:
    return lt.Batch.from_sequences(random_batch(131, [90, 40], seed=3)[0])


@pytest.fixture
def model(odd_model: Callable[..., Path]) -> Decoder:
    return lt.load_model(odd_model("llama-many-tiles", torch.bfloat16))


def saved_bytes(model: Decoder, adapter: lt.Adapter, batch: lt.Batch) -> int:
    """What autograd keeps for the backward and does not find in the mapped file."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaves = {n: p.detach().requires_grad_() for n, p in adapter.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = reference_loss(model, lt.Adapter(adapter.config, leaves), batch, 1)
    mapped = [model.checkpoint[name] for name in model.spec.tensor_shapes()]
    for tensor in [*mapped, *adapter.parameters.values()]:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", ["llama-many-tiles", "qwen2-gqa3-untied"])
def test_prediction_covers_what_autograd_keeps(
    name: str, dropout: float, dtype: str, odd_model: Callable[..., Path], batch: lt.Batch
) -> None:
    model = lt.load_model(odd_model(name, torch.bfloat16), dtype)
    adapter = random_adapter(model, lt.LoraConfig(r=8, lora_dropout=dropout))
    kept = saved_bytes(model, adapter, batch)
    fixed = autograd_bytes(model, adapter, lt.Batch.from_sequences([[1]]), model.compute_dtype)
    weights = sum(linear.weight.nbytes for block in model.linears for linear in block.values())
    weights = (weights + model.head.nbytes) // 2 * model.compute_dtype.itemsize
    predicted = autograd_bytes(model, adapter, batch, model.compute_dtype) - fixed + weights
    # Beside what is kept there are two more copies of the logits, and one block's gradients.
    assert kept < predicted < 2.5 * kept


def test_weights_in_the_compute_dtype_are_the_files(
    odd_model: Callable[..., Path], batch: lt.Batch
) -> None:
    sizes = {}
    for stored in (torch.float32, torch.bfloat16):
        model = lt.load_model(odd_model("llama-many-tiles", stored))
        sizes[stored] = autograd_bytes(model, lt.Adapter.create(model), batch, torch.float32)
    spec = model.spec
    linears = sum(m.weight.shape[0] * m.weight.shape[1] for b in model.linears for m in b.values())
    widened = 4 * (linears + spec.vocab_size * spec.hidden_size)
    assert sizes[torch.bfloat16] - sizes[torch.float32] == pytest.approx(1.1 * widened, rel=1e-3)


def test_the_best_truth_that_fits_is_taken(model: Decoder, batch: lt.Batch) -> None:
    adapter = lt.Adapter.create(model)
    known = truths(model, adapter, batch)
    names = [truth.name for truth in known]
    assert names == [
        "autograd float64", "autograd float32", "mebp float64 with full logits", "mebp float64",
    ]  # fmt: skip
    needed = [truth.needed_bytes for truth in known]
    assert needed[0] > needed[1]
    assert needed[2] > needed[3]
    for truth in known:
        enough = choose_truth(model, adapter, batch, truth.needed_bytes)
        assert enough.needed_bytes <= truth.needed_bytes
        assert names.index(enough.name) <= names.index(truth.name)
    assert choose_truth(model, adapter, batch, needed[0] - 1).name != "autograd float64"
    with pytest.raises(ConfigError, match="MB even with the smallest reference") as error:
        choose_truth(model, adapter, batch, min(needed) - 1)
    assert error.value.exit_code == 2


def test_in_float64_float32_is_no_truth(odd_model: Callable[..., Path], batch: lt.Batch) -> None:
    model = lt.load_model(odd_model("llama-many-tiles"), "float64")
    known = truths(model, lt.Adapter.create(model), batch)
    assert {truth.dtype for truth in known} == {torch.float64}


def check_with(place: int, model: Decoder, batch: lt.Batch) -> run.CheckResult:
    """A check that is left with one of the truths: the memory is made to be what it needs."""
    adapter = run.filled_adapter(model, lt.LoraConfig(r=4), 0)
    wanted = truths(model, adapter, batch)[place]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "choose_truth", lambda *given: wanted)
        result = run.check_gradients(model, adapter, batch, available=0)
    assert result.truth == wanted
    return result


def test_float32_autograd_alone_as_truth(model: Decoder, batch: lt.Batch) -> None:
    result = check_with(1, model, batch)
    assert result.passed
    assert set(result.exact) == {"mesp", "mebp"}
    for (one,) in result.exact.values():
        assert (one.precision, one.against) == ("float32", "autograd float32")
        assert 0 < one.whole.worst_relative_error < one.bound < 1e-3


@pytest.mark.parametrize("place", [2, 3])
def test_mebp_as_truth(place: int, model: Decoder, batch: lt.Batch) -> None:
    result = check_with(place, model, batch)
    assert result.passed
    assert set(result.exact) == {"mesp"}
    wide, narrow, same = result.exact["mesp"]
    name = result.truth.name
    assert [(c.precision, c.against) for c in (wide, narrow)] == [
        ("float64", name),
        ("float32", name),
    ]
    assert same.against == name.replace("float64", "float32")
    assert wide.whole.worst_relative_error < 1e-12 < narrow.whole.worst_relative_error


def test_a_wrong_gradient_fails_against_every_truth(
    model: Decoder, batch: lt.Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    honest = run._Subject.gradients

    def broken(self: run._Subject, method: str, *more: object) -> run.Grads:
        grads = dict(honest(self, method, *more))  # type: ignore[arg-type]
        if method == "mesp":
            grads[wrong] = grads[wrong] * 1.001
        return grads

    monkeypatch.setattr(run._Subject, "gradients", broken)
    for place in range(4):
        result = check_with(place, model, batch)
        assert not result.passed
        for one in result.exact["mesp"]:
            assert list(one.exceeded) == [wrong]


def test_shaking_moves_norms_by_one_rounding_and_leaves_the_model(model: Decoder) -> None:
    def weights(of: Decoder) -> list[torch.Tensor]:
        return [weight for norms in of.norms for weight in norms if weight is not None]

    before = [weight.clone() for weight in weights(model)]
    moved = run.shaken(model, 1)
    eps = torch.finfo(torch.float32).eps
    for old, new, kept in zip(before, weights(moved), weights(model), strict=True):
        assert torch.equal(old, kept)
        change = ((new - old) / old).abs()
        assert 0 < float(change.max()) <= 2 * eps
    assert not torch.equal(moved.final_norm, model.final_norm)
    assert not torch.equal(moved.final_norm, run.shaken(model, 2).final_norm)
    assert moved.linears is model.linears


def test_short_sequences_whose_attention_has_no_gradient(model: Decoder) -> None:
    """Two tokens: the one labelled position sees one key, so that q and k have no gradient."""
    batch = lt.Batch.from_sequences([[5, 9], [7, 2]])
    adapter = run.filled_adapter(model, lt.LoraConfig(), 0)
    result = run.check_gradients(model, adapter, batch, available=10**10)
    assert result.passed
    assert result.exact["mesp"][1].modules["q_proj"].worst_relative_error < 1e-6
