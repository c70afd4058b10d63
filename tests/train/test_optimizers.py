"""SGD and AdamW against torch.optim: the same parameters after several steps, to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowtide.train.optim import OPTIMIZERS
from lowtide.train.settings import OptimizerSettings
from lowtide.train.sink import AccumulateSink, ApplySink

SHAPES = {"a": (5, 7), "b": (3,), "c": (11, 2)}


def parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def gradients(steps: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            name: torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** (-step)
            for name, shape in SHAPES.items()
        }
        for step in range(steps)
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        ("sgd", torch.optim.SGD, {}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9}),
        ("sgd", torch.optim.SGD, {"weight_decay": 0.1}),
        ("sgd", torch.optim.SGD, {"momentum": 0.7, "weight_decay": 0.3}),
        ("adamw", torch.optim.AdamW, {"weight_decay": 0.0}),
        ("adamw", torch.optim.AdamW, {"weight_decay": 0.2}),
        ("adamw", torch.optim.AdamW, {"weight_decay": 0.1, "betas": (0.5, 0.95), "eps": 1e-3}),
    ],
)
def test_updates_are_those_of_torch_optim(ours: str, theirs: Any, options: dict[str, Any]) -> None:
    rate = 0.05
    named = {"weight_decay": options.get("weight_decay", 0.0)}
    named["momentum"] = options.get("momentum", 0.0)
    named["beta1"], named["beta2"] = options.get("betas", (0.9, 0.999))
    named["adam_eps"] = options.get("eps", 1e-8)
    settings = OptimizerSettings(optimizer=ours, learning_rate=rate, **named)
    mine = parameters()
    sink = ApplySink(mine, OPTIMIZERS[ours](settings, mine))
    truth = {name: torch.nn.Parameter(p.clone()) for name, p in parameters().items()}
    reference = theirs(truth.values(), lr=rate, **options)
    for step in gradients(7):
        for name in reversed(SHAPES):
            sink.add(name, step[name].clone())
            truth[name].grad = step[name].clone()
        sink.finish()
        reference.step()
        for name, p in mine.items():
            torch.testing.assert_close(p, truth[name].detach(), rtol=1e-12, atol=1e-14)
    moved = [float((mine[name] - parameters()[name]).abs().max()) for name in SHAPES]
    assert min(moved) > 1e-3


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_both_sinks_give_the_same_parameters(name: str) -> None:
    settings = OptimizerSettings(optimizer=name, learning_rate=0.1, momentum=0.5)
    applied, summed = parameters(), parameters()
    first = ApplySink(applied, OPTIMIZERS[name](settings, applied))
    second = AccumulateSink(summed, OPTIMIZERS[name](settings, summed), None)
    for step in gradients(4):
        for parameter, grad in step.items():
            first.add(parameter, grad.clone())
            second.add(parameter, grad.clone())
        assert first.finish() is None
        norm = second.finish()
        assert norm == pytest.approx(float(torch.cat([g.flatten() for g in step.values()]).norm()))
        for parameter, p in applied.items():
            assert torch.equal(p, summed[parameter])


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
def test_clipping_is_that_of_torch(max_norm: float) -> None:
    mine = parameters()
    settings = OptimizerSettings(optimizer="sgd", learning_rate=1.0)
    sink = AccumulateSink(mine, OPTIMIZERS["sgd"](settings, mine), max_norm)
    truth = {name: torch.nn.Parameter(p.clone()) for name, p in parameters().items()}
    first, second = gradients(2)
    for name, parameter in truth.items():
        sink.add(name, first[name].clone())
        sink.add(name, second[name].clone())
        parameter.grad = first[name] + second[name]
    expected = torch.nn.utils.clip_grad_norm_(truth.values(), max_norm)
    assert sink.finish() == pytest.approx(float(expected), rel=1e-12)
    for name, parameter in truth.items():
        assert parameter.grad is not None
        wanted = parameter.detach() - parameter.grad
        # torch divides by the norm + 1e-6
        torch.testing.assert_close(mine[name], wanted, rtol=1e-5, atol=1e-9)


def test_no_gradient_is_kept_once_it_is_used() -> None:
    import weakref

    for name in OPTIMIZERS:
        settings = OptimizerSettings(optimizer=name, momentum=0.9, weight_decay=0.1)
        mine = parameters()
        sinks = [
            ApplySink(mine, OPTIMIZERS[name](settings, mine)),
            AccumulateSink(mine, OPTIMIZERS[name](settings, mine), 1.0),
        ]
        for sink in sinks:
            alive = []
            for parameter, grad in gradients(1)[0].items():
                alive.append(weakref.ref(grad))
                sink.add(parameter, grad)
            del grad
            if isinstance(sink, ApplySink):
                assert [ref() for ref in alive] == [None] * len(alive)
            sink.finish()
            assert [ref() for ref in alive] == [None] * len(alive)
