"""One update of the trainer: how micro-batches, clipping and seeds enter it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lowtide as lt
from lowtide.config import build
from lowtide.errors import TrainingError
from lowtide.methods import get_method
from lowtide.model.decoder import Decoder
from lowtide.train.loop import Trainer
from lowtide.train.settings import TrainSettings

ROWS = [[5, 6, 7, 8, 9, 10, 11], [3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7], [2, 7, 1]]
LABELS = [
    ROWS[0],
    [-100, -100, -100, -100, 5],
    [-100, *ROWS[2][1:]],
    [-100, 7, -100],
]


def trainer(decoder: Decoder, **given: Any) -> Trainer:
    settings = build(
        TrainSettings,
        {"model": "-", "data": "-", "adapter_path": "-", "learning_rate": 0.1, **given},
    )
    adapter = lt.Adapter.create(decoder, settings.lora_config(decoder.spec), seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in adapter.items():
        if ".lora_B." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return Trainer(decoder, adapter, get_method(settings.method, settings), settings)


def batch(*rows: int) -> lt.Batch:
    return lt.Batch.from_sequences([ROWS[i] for i in rows], [LABELS[i] for i in rows])


def assert_same(one: Trainer, other: Trainer, tolerance: float = 1e-12) -> None:
    for name, parameter in one.adapter.items():
        torch.testing.assert_close(
            parameter, other.adapter.parameters[name], rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adafactor"])
def test_micro_batches_weigh_each_token_alike(decoder: Decoder, optimizer: str) -> None:
    # Plain averaging of the micro-batches' means would count row 1's one label as much as row 2's
    # eight. AdamW divides by the gradient's size, which enlarges rounding.
    joined = trainer(decoder, optimizer=optimizer, adam_eps=1e-3)
    split = trainer(decoder, optimizer=optimizer, adam_eps=1e-3, grad_accumulation_steps=3)
    for step in (1, 2):
        whole = joined.update([batch(0, 1, 2, 3)], step)
        parts = split.update([batch(0), batch(1), batch(2, 3)], step)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
        assert parts.norms.by_layer == pytest.approx(whole.norms.by_layer, rel=1e-10)
        assert_same(joined, split)
    fresh = trainer(decoder)
    assert not torch.equal(*(next(iter(t.adapter.parameters.values())) for t in (fresh, joined)))


def test_an_update_is_the_optimisers_step_on_the_gradients(decoder: Decoder) -> None:
    ours = trainer(decoder, optimizer="sgd", learning_rate=0.3)
    whole = batch(0, 1, 2, 3)
    before = {name: p.clone() for name, p in ours.adapter.items()}
    found = lt.gradients(decoder, ours.adapter, whole, method="autograd")
    update = ours.update([whole], 1)
    assert update.loss == pytest.approx(found.loss, rel=1e-12)
    assert update.learning_rate == 0.3
    squares = [0.0] * decoder.spec.num_layers
    for name, grad in found.grads.items():
        squares[int(name.split(".layers.")[1].split(".")[0])] += float(grad.square().sum())
    assert update.norms.by_layer == pytest.approx([square**0.5 for square in squares], rel=1e-10)
    assert update.norms.total == pytest.approx(sum(squares) ** 0.5, rel=1e-10)
    for name, p in ours.adapter.items():
        torch.testing.assert_close(
            p, before[name] - 0.3 * found.grads[name], rtol=1e-10, atol=1e-12
        )


def test_a_large_limit_changes_nothing_and_a_small_one_shortens_the_step(decoder: Decoder) -> None:
    free = trainer(decoder, optimizer="sgd")
    loose = trainer(decoder, optimizer="sgd", max_grad_norm=1e9)
    tight = trainer(decoder, optimizer="sgd", max_grad_norm=0.01)
    start = torch.cat([p.flatten().clone() for p in tight.adapter.parameters.values()])
    for one in (free, loose, tight):
        norm = one.update([batch(0, 1)], 1).norms.total
        assert norm > 0.01
    assert_same(free, loose)
    end = torch.cat([p.flatten() for p in tight.adapter.parameters.values()])
    assert float((end - start).norm()) == pytest.approx(0.1 * 0.01, rel=1e-6)


def test_dropout_depends_on_seed_step_and_micro_batch_only(decoder: Decoder) -> None:
    def loss(seed: int, step: int) -> float:
        return trainer(decoder, lora_dropout=0.5, seed=seed).update([batch(0, 2)], step).loss

    assert loss(1, 1) == loss(1, 1)
    assert len({loss(1, 1), loss(1, 2), loss(2, 1)}) == 3
    plain = trainer(decoder).update([batch(0, 2)], 1).loss
    assert plain not in (loss(1, 1), loss(1, 2))


def test_a_loss_that_is_not_finite_leaves_the_parameters_alone(decoder: Decoder) -> None:
    one = trainer(decoder)
    name = next(name for name in reversed(one.adapter.parameters) if ".lora_B." in name)
    one.adapter.parameters[name].fill_(float("nan"))
    before = {name: p.clone() for name, p in one.adapter.items()}
    with pytest.raises(TrainingError, match=r"the loss is nan. Lower --learning-rate"):
        one.update([batch(0)], 1)
    bits = torch.int64  # NaN is not equal to itself
    assert all(torch.equal(p.view(bits), before[n].view(bits)) for n, p in one.adapter.items())


class _Broken:
    """A method whose second gradient is not finite."""

    name, exact = "broken", True

    def step(
        self, model: Decoder, adapter: lt.Adapter, batch: lt.Batch, sink: Any, _: Any
    ) -> float:
        for number, (name, p) in enumerate(adapter.items()):
            sink.add(name, torch.full_like(p, float("nan") if number == 1 else 1.0))
        return 1.0


CLIPPED: list[dict[str, Any]] = [
    {},
    {"grad_accumulation_steps": 2},
    {"max_grad_norm": 1.0},
    {"max_grad_norm": 1.0, "clip_mode": "two-pass"},
    {"max_grad_norm": 1.0, "clip_mode": "per-parameter"},
]


@pytest.mark.parametrize("given", CLIPPED)
def test_a_gradient_that_is_not_finite_is_named(decoder: Decoder, given: dict[str, Any]) -> None:
    one = trainer(decoder, **given)
    one.method = _Broken()
    before = {name: p.clone() for name, p in one.adapter.items()}
    name = list(before)[1]
    with pytest.raises(TrainingError) as error:
        one.update([batch(0)], 1)
    assert f"the gradient of {name} is not finite" in str(error.value)
    assert torch.equal(one.adapter.parameters[name], before[name])
    applied = given == {} or given.get("clip_mode") == "per-parameter"
    changed = [n for n, p in one.adapter.items() if not torch.equal(p, before[n])]
    assert bool(changed) == applied


@pytest.mark.parametrize("method", ["mesp", "mebp", "mezo", "lcsb"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lion", "adafactor"])
def test_two_passes_clip_as_summing_does(decoder: Decoder, optimizer: str, method: str) -> None:
    """With dropout, whose masks must be the same in both, and without room for the gradients."""
    given = {"optimizer": optimizer, "max_grad_norm": 0.02, "lora_dropout": 0.3, "adam_eps": 1e-3}
    ones = [
        trainer(decoder, method=method, **given, clip_mode=mode)
        for mode in ("accumulate", "two-pass")
    ]
    for step in (1, 2, 3):
        summed, passed = (one.update([batch(0, 1, 2)], step) for one in ones)
        assert summed.loss == pytest.approx(passed.loss, rel=1e-12)
        assert summed.norms.total == pytest.approx(passed.norms.total, rel=1e-12)
        assert summed.norms.total > 0.02
        assert_same(*ones)


def test_each_parameter_is_clipped_by_its_own_norm(decoder: Decoder) -> None:
    found = lt.gradients(decoder, trainer(decoder).adapter, batch(0, 1), method="autograd").grads
    limit = float(torch.stack([grad.norm() for grad in found.values()]).median())
    one = trainer(decoder, optimizer="sgd", max_grad_norm=limit, clip_mode="per-parameter")
    before = {name: p.clone() for name, p in one.adapter.items()}
    one.update([batch(0, 1)], 1)
    clipped = 0
    for name, p in one.adapter.items():
        truth = torch.nn.Parameter(before[name])
        truth.grad = found[name].clone()
        clipped += float(torch.nn.utils.clip_grad_norm_([truth], limit)) > limit
        wanted = truth.detach() - 0.1 * truth.grad  # torch divides by the norm + 1e-6
        torch.testing.assert_close(p, wanted, rtol=1e-4, atol=1e-8)
    assert clipped == len(found) // 2
