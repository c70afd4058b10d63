"""MeZO: the estimate is what its formula says, and the parameters are never touched."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import random_adapter, random_batch
from small import write_jsonl
from torch import Tensor

import lowtide as lt
from lowtide.errors import TrainingError
from lowtide.methods import MethodOptions, get_method
from lowtide.methods.mezo import Direction
from lowtide.model.decoder import Decoder
from lowtide.model.reference import reference_loss

EPS = 1e-4


@pytest.fixture
def model(odd_model: Callable[..., Path]) -> Decoder:
    return lt.load_model(odd_model("qwen2-mqa"), compute_dtype="float64")


@pytest.fixture
def batch() -> lt.Batch:
    return lt.Batch.from_sequences(*random_batch(131, [23, 1, 9], masked=0.5))


def _flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten().double() for g in grads.values()])


@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_estimate_is_the_formula(
    directions: int, dropout: float, model: Decoder, batch: lt.Batch
) -> None:
    """Recomputed with the readable forward on a copy of the adapter that is really moved."""
    adapter = random_adapter(model, lt.LoraConfig(r=3, lora_dropout=dropout))
    method = get_method("mezo", MethodOptions(zo_eps=EPS, zo_directions=directions))
    ours = lt.gradients(model, adapter, batch, method, dropout_seed=5, seed=11)
    expected = {name: torch.zeros_like(p) for name, p in adapter.items()}
    for number in range(directions):
        z = {name: Direction(adapter, 11, number).of(name) for name, _ in adapter.items()}
        losses = []
        for sign in (1, -1):
            moved = {name: p + sign * EPS * z[name] for name, p in adapter.items()}
            total = reference_loss(model, lt.Adapter(adapter.config, moved), batch, 5)
            losses.append(float(total) / batch.n_tokens)
        slope = (losses[0] - losses[1]) / (2 * EPS)
        for name in expected:
            expected[name] += slope * z[name] / directions
    # Rounding of the two losses, about 1e-15 each, is divided by 2 eps.
    difference = (_flat(ours.grads) - _flat(expected)).norm() / _flat(expected).norm()
    assert difference < 1e-9
    exact = lt.gradients(model, adapter, batch, "mesp", dropout_seed=5)
    assert ours.loss == pytest.approx(exact.loss, rel=1e-2)
    assert ours.loss != exact.loss


def test_one_direction_times_z_is_the_directional_derivative(
    model: Decoder, batch: lt.Batch
) -> None:
    adapter = random_adapter(model, lt.LoraConfig(r=3))
    method = get_method("mezo", MethodOptions(zo_eps=EPS))
    estimate = _flat(lt.gradients(model, adapter, batch, method, seed=3).grads)
    exact = _flat(lt.gradients(model, adapter, batch, "autograd").grads)
    z = torch.cat([Direction(adapter, 3, 0).of(n).flatten() for n, _ in adapter.items()])
    # A central difference errs by eps^2 times the third derivative.
    assert float(estimate[0] / z[0]) == pytest.approx(float(exact @ z), rel=1e-4)


def test_directions_are_normal_and_replayed(model: Decoder) -> None:
    adapter = random_adapter(model, lt.LoraConfig(r=8))
    names = [name for name, _ in adapter.items()]

    def whole(seed: int, number: int) -> Tensor:
        return torch.cat([Direction(adapter, seed, number).of(n).flatten() for n in names])

    z = whole(1, 0)
    assert z.equal(whole(1, 0))
    n = z.numel()
    # Five standard errors of a mean, of a variance, and of a correlation of n normal numbers.
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / n)
    for other in (whole(2, 0), whole(1, 1), z.roll(1)):
        assert abs(float(z @ other)) / n < 5 / math.sqrt(n)
    assert not Direction(adapter, 1, 0).of(names[0]).equal(Direction(adapter, 1, 0).of(names[2]))


def test_the_cosine_is_of_the_size_that_theory_gives(model: Decoder, batch: lt.Batch) -> None:
    """Of k directions in n dimensions: about sqrt(k / (n + k + 1))."""
    adapter = random_adapter(model, lt.LoraConfig(r=3))
    exact = _flat(lt.gradients(model, adapter, batch, "mesp").grads)
    n, k = exact.numel(), 64
    method = get_method("mezo", MethodOptions(zo_eps=EPS, zo_directions=k))
    cosines = []
    for seed in range(6):
        estimate = _flat(lt.gradients(model, adapter, batch, method, seed=seed).grads)
        cosines.append(float(exact @ estimate / exact.norm() / estimate.norm()))
    expected = math.sqrt(k / (n + k + 1))
    # Each cosine scatters by about 1 / sqrt(n); the mean of six by 1 / sqrt(6 n).
    assert abs(sum(cosines) / 6 - expected) < 5 / math.sqrt(6 * n)


def test_parameters_are_untouched_to_the_bit_even_when_a_forward_fails(
    model: Decoder, batch: lt.Batch
) -> None:
    adapter = random_adapter(model, lt.LoraConfig(r=3))
    before = {name: p.clone() for name, p in adapter.items()}
    addresses = {name: p.data_ptr() for name, p in adapter.items()}
    lt.gradients(model, adapter, batch, "mezo")
    with pytest.raises(TrainingError, match="at a perturbed point, the loss is"):
        lt.gradients(model, adapter, batch, get_method("mezo", MethodOptions(zo_eps=1e200)))
    assert all(p.equal(before[name]) for name, p in adapter.items())
    assert addresses == {name: p.data_ptr() for name, p in adapter.items()}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_training_with_it_is_replayed_by_its_seed(
    accumulation: int, odd_model: Callable[..., Path], tmp_path: Path
) -> None:
    from helpers import asset

    data = write_jsonl(tmp_path / "d.jsonl", [{"text": f"once upon a time {i}"} for i in range(9)])
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        lt.train(
            model=str(asset("models/stories260K/hf-llama")), data=str(data), method="mezo",
            adapter_path=str(tmp_path / name), iters=4, seed=seed, learning_rate=1e-2,
            max_seq_length=16, grad_accumulation_steps=accumulation,
        )  # fmt: skip
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
