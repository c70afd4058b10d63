"""Each optimiser against an independent one: the same parameters after several steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lowtide.errors import ConfigError
from lowtide.methods import GradSink
from lowtide.train.optim import OPTIMIZERS, Held, Optimizer
from lowtide.train.recipe import OPTIONS_OF, OptimizerSettings
from lowtide.train.sink import Accumulated, InBackward, Norms, TwoPass, Updater
from lowtide.train.states import PIECE

_LINEAR = "base_model.model.model.layers.{}.self_attn.{}"
SHAPES = {
    _LINEAR.format(0, "q_proj.lora_A.weight"): (5, 7),
    _LINEAR.format(0, "q_proj.lora_magnitude_vector.weight"): (3,),
    _LINEAR.format(2, "k_proj.lora_A.weight"): (3, PIECE // 2),  # a piece holds two of its rows
    _LINEAR.format(2, "k_proj.lora_B.weight"): (11, 2),
}
RATE = 0.05


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


def sender(*passes: Mapping[str, Tensor], loss: float = 0.0) -> Callable[[GradSink], float]:
    """Sends copies of these gradients each time, the last parameter first."""

    def run(sink: GradSink) -> float:
        for one in passes:
            for name in reversed(one):
                sink.add(name, one[name].clone())
        return loss

    return run


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv 2302.06675, word by word."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"betas": (0.9, 0.99), "weight_decay": 0.0, **options})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for theta in group["params"]:
                m = self.state[theta].setdefault("m", torch.zeros_like(theta))
                c = beta1 * m + (1 - beta1) * theta.grad
                theta -= group["lr"] * (torch.sign(c) + group["weight_decay"] * theta)
                self.state[theta]["m"] = beta2 * m + (1 - beta2) * theta.grad


def transformers_adafactor(params: Any, **options: Any) -> torch.optim.Optimizer:
    """As `--optim adafactor` of transformers makes it."""
    from transformers.optimization import Adafactor

    made: torch.optim.Optimizer = Adafactor(
        params, scale_parameter=False, relative_step=False, **options
    )
    return made


# One step of 1 makes `max(eps2, rms(p)) min(lr, 1 / sqrt(t))` the rate itself, as ours is.
ABSOLUTE = {"eps": (None, 1e3), "lr": RATE / 1e3}
CASES: list[tuple[dict[str, Any], Any, dict[str, Any]]] = [
    ({"optimizer": "sgd"}, torch.optim.SGD, {}),
    ({"optimizer": "sgd", "momentum": 0.9}, torch.optim.SGD, {"momentum": 0.9}),
    ({"optimizer": "sgd", "momentum": 0.7, "weight_decay": 0.3}, torch.optim.SGD,
     {"momentum": 0.7, "weight_decay": 0.3}),
    ({"optimizer": "adamw"}, torch.optim.AdamW, {"weight_decay": 0.0}),
    ({"optimizer": "adamw", "weight_decay": 0.2}, torch.optim.AdamW, {"weight_decay": 0.2}),
    ({"optimizer": "adamw", "beta1": 0.5, "beta2": 0.95, "adam_eps": 1e-3}, torch.optim.AdamW,
     {"weight_decay": 0.0, "betas": (0.5, 0.95), "eps": 1e-3}),
    ({"optimizer": "lion"}, Lion, {}),
    ({"optimizer": "lion", "beta1": 0.8, "beta2": 0.7, "weight_decay": 0.2}, Lion,
     {"betas": (0.8, 0.7), "weight_decay": 0.2}),
    ({"optimizer": "adafactor", "adafactor_relative": True}, torch.optim.Adafactor, {}),
    ({"optimizer": "adafactor", "adafactor_relative": True, "weight_decay": 0.2},
     torch.optim.Adafactor, {"weight_decay": 0.2}),
    ({"optimizer": "adafactor"}, torch.optim.Adafactor, ABSOLUTE),
    ({"optimizer": "adafactor", "weight_decay": 0.2}, transformers_adafactor,
     {"weight_decay": 0.2}),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs", "options"), CASES)
def test_updates_are_those_of_an_independent_optimiser(
    ours: dict[str, Any], theirs: Any, options: dict[str, Any]
) -> None:
    settings = OptimizerSettings(learning_rate=RATE, **ours)
    mine = parameters()
    optimizer = OPTIMIZERS[settings.optimizer](settings, mine)
    updater = InBackward(mine, optimizer)
    truth = {name: torch.nn.Parameter(p.clone()) for name, p in parameters().items()}
    reference = theirs(truth.values(), **{"lr": RATE, **options})
    for number, step in enumerate(gradients(7), start=1):
        optimizer.start(number, RATE)
        updater.update(sender(step))
        for name in SHAPES:
            truth[name].grad = step[name].clone()
        reference.step()
        for name, p in mine.items():
            torch.testing.assert_close(p, truth[name].detach(), rtol=1e-12, atol=1e-14)
    moved = [float((mine[name] - parameters()[name]).abs().max()) for name in SHAPES]
    assert min(moved) > 1e-3


def test_every_optimiser_is_held_to_another() -> None:
    assert {ours["optimizer"] for ours, _, _ in CASES} == set(OPTIMIZERS) == set(OPTIONS_OF)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_rate_that_changes_is_that_of_torch(name: str) -> None:
    case = next(case for case in CASES if case[0]["optimizer"] == name)
    settings = OptimizerSettings(learning_rate=1.0, **case[0])
    mine = parameters()
    optimizer = OPTIMIZERS[name](settings, mine)
    truth = {n: torch.nn.Parameter(p.clone()) for n, p in parameters().items()}
    reference = case[1](truth.values(), **{"lr": 1.0, **case[2]})
    for number, step in enumerate(gradients(5), start=1):
        rate = RATE / number
        optimizer.start(number, rate)
        reference.param_groups[0]["lr"] = rate
        for n, grad in step.items():
            optimizer.update(n, mine[n], grad.clone())
            truth[n].grad = grad
        reference.step()
    for n, p in mine.items():
        torch.testing.assert_close(p, truth[n].detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("relative", "theirs"), [(False, transformers_adafactor), (True, torch.optim.Adafactor)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adafactor_with_gradients_that_are_nothing_or_nearly(
    relative: bool, theirs: Any, dtype: torch.dtype
) -> None:
    """The two rules differ where squares are below epsilon, as LoRA's often are."""
    settings = OptimizerSettings(optimizer="adafactor", adafactor_relative=relative)
    mine = {name: p.to(dtype) for name, p in parameters().items()}
    optimizer = OPTIMIZERS["adafactor"](settings, mine)
    truth = {n: torch.nn.Parameter(p.clone()) for n, p in mine.items()}
    reference = theirs(truth.values(), lr=RATE)
    for number, step in enumerate(gradients(5), start=1):
        optimizer.start(number, RATE)
        for name, grad in step.items():
            small = (grad * (0.0 if number < 3 else 1e-9)).to(dtype)
            truth[name].grad = small
            optimizer.update(name, mine[name], small.clone())
        reference.step()
    tolerance = 100 * torch.finfo(dtype).eps
    for name, p in mine.items():
        torch.testing.assert_close(p, truth[name].detach(), rtol=tolerance, atol=tolerance)
    moved = [float((p - parameters()[n].to(dtype)).abs().max()) for n, p in mine.items()]
    assert max(moved) > (1e-4 if not relative else 0.0)


@pytest.mark.parametrize("relative", [False, True])
def test_adafactor_keeps_float32_masters_of_a_bfloat16_adapter(relative: bool) -> None:
    settings = OptimizerSettings(
        optimizer="adafactor", adafactor_relative=relative, weight_decay=0.1
    )
    starts = {name: p.bfloat16() for name, p in parameters().items()}
    wide = {name: p.float() for name, p in starts.items()}
    ours, masters = (OPTIMIZERS["adafactor"](settings, p) for p in (starts, wide))
    for number, step in enumerate(gradients(12), start=1):
        for optimizer, held in ((ours, starts), (masters, wide)):
            optimizer.start(number, 1e-3)
            for name, grad in step.items():
                optimizer.update(name, held[name], grad.float())
    for name, p in wide.items():
        # rms(p) is summed piece by piece on one side, so the masters agree to rounding.
        off = (starts[name].float() - p).abs()
        assert bool((off <= 2.0**-8 * p.abs() * 1.001).all())
        assert not torch.equal(starts[name], parameters()[name].bfloat16())


def ways(name: str) -> Iterator[tuple[dict[str, Tensor], Optimizer, Updater]]:
    settings = OptimizerSettings(optimizer=name, learning_rate=0.1, momentum=0.5)
    for kind, limits in ((InBackward, ()), (Accumulated, ()), (TwoPass, (1e9,))):
        mine = parameters()
        optimizer = OPTIMIZERS[name](settings, mine)
        yield mine, optimizer, kind(mine, optimizer, *limits)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_all_ways_give_the_same_parameters_and_norms(name: str) -> None:
    all_ways = list(ways(name))
    for number, step in enumerate(gradients(4), start=1):
        found: list[tuple[float, Norms]] = []
        for _, optimizer, updater in all_ways:
            optimizer.start(number, 0.1)
            found.append(updater.update(sender(step, loss=3.0)))
        assert all(one == (3.0, found[0][1]) for one in found)
        norm = float(torch.cat([g.flatten() for g in step.values()]).norm())
        assert found[0][1].total == pytest.approx(norm, rel=1e-12)
        first, none, last = found[0][1].by_layer
        assert none is None
        assert (first, last) == pytest.approx(
            [
                float(torch.cat([g.flatten() for n, g in step.items() if f".{layer}." in n]).norm())
                for layer in (0, 2)
            ]
        )
        for mine, _, _ in all_ways[1:]:
            assert all(torch.equal(p, mine[n]) for n, p in all_ways[0][0].items())


def test_a_norm_whose_squares_overflow_is_no_failure() -> None:
    mine = {name: p.float() for name, p in parameters().items()}
    settings = OptimizerSettings(optimizer="lion")
    updater = InBackward(mine, OPTIMIZERS["lion"](settings, mine))
    step = {name: torch.full_like(p, 1e30) for name, p in mine.items()}
    expected = 1e30 * sum(p.numel() for p in mine.values()) ** 0.5
    assert updater.update(sender(step))[1].total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("each", [False, True])
def test_clipping_is_that_of_torch(max_norm: float, each: bool) -> None:
    mine = parameters()
    settings = OptimizerSettings(optimizer="sgd", learning_rate=1.0)
    updater = Accumulated(mine, OPTIMIZERS["sgd"](settings, mine), max_norm, each=each)
    truth = {name: torch.nn.Parameter(p.clone()) for name, p in parameters().items()}
    first, second = gradients(2)
    for name, parameter in truth.items():
        parameter.grad = first[name] + second[name]
    clip, everything = torch.nn.utils.clip_grad_norm_, list(truth.values())
    total = torch.cat([p.grad.flatten() for p in everything if p.grad is not None]).norm()
    for group in [[p] for p in everything] if each else [everything]:
        clip(group, max_norm)
    _, norms = updater.update(sender(first, second))
    assert norms.total == pytest.approx(float(total), rel=1e-12)
    for name, parameter in truth.items():
        assert parameter.grad is not None
        wanted = parameter.detach() - parameter.grad
        # torch divides by the norm + 1e-6
        torch.testing.assert_close(mine[name], wanted, rtol=1e-5, atol=1e-6 * max_norm)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_no_gradient_is_kept_once_it_is_used(name: str) -> None:
    for _, _, updater in ways(name):
        alive: list[weakref.ref[Tensor]] = []
        kept_to_the_end = isinstance(updater, Accumulated)

        def run(
            sink: GradSink,
            alive: list[weakref.ref[Tensor]] = alive,
            kept: bool = kept_to_the_end,
        ) -> float:
            for parameter, p in parameters().items():
                grad = torch.ones_like(p)
                alive.append(weakref.ref(grad))
                sink.add(parameter, grad)
                del grad
                assert (alive[-1]() is not None) == kept
            return 0.0

        updater.update(run)
        assert [ref() for ref in alive] == [None] * len(alive)


@pytest.mark.parametrize("state", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_bytes_are_those_of_the_state(name: str, state: str) -> None:
    """What `held_bytes` counts beyond the kept tensors is buffers of a few pieces."""
    mine = {n: torch.zeros(8, 1000 + 100 * i) for i, n in enumerate(SHAPES)}
    settings = OptimizerSettings(optimizer=name, optimizer_state=state, momentum=0.9)
    optimizer = OPTIMIZERS[name](settings, mine)
    kept = {t.untyped_storage().data_ptr(): t for t in optimizer.state().values()}
    held = sum(t.untyped_storage().nbytes() for t in kept.values())
    counted = OPTIMIZERS[name].held_bytes(Held([p.shape for p in mine.values()], 4, state, True))
    assert 0 <= counted - held <= 10 * 4 * PIECE
    per_parameter = held / sum(p.numel() for p in mine.values())
    moments = {"sgd": 1, "adamw": 2, "lion": 1, "adafactor": 0}[name]
    each = {"float32": 4, "bfloat16": 2, "8bit": 1.016}[state]
    factored = 4 * (8 + 1150) / (8 * 1150) if name == "adafactor" else 0.0
    assert per_parameter == pytest.approx(moments * each + factored, rel=0.03)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"optimizer": "adamw", "momentum": 0.9}, "--momentum belongs to sgd, not to adamw"),
        ({"optimizer": "sgd", "beta1": 0.8}, "--beta1 belongs to adamw and lion, not to sgd"),
        ({"optimizer": "lion", "adam_eps": 1e-6}, "--adam-eps belongs to adamw, not to lion"),
        (
            {"optimizer": "adamw", "adafactor_relative": True},
            "--adafactor-relative belongs to adafactor, not to adamw",
        ),
        (
            {"optimizer": "adafactor", "optimizer_state": "8bit"},
            "--optimizer-state belongs to sgd and adamw and lion, not to adafactor",
        ),
        (
            {"weight_decay_on": "lora_B"},
            "--weight-decay-on says what decays, and --weight-decay is 0",
        ),
    ],
)
def test_what_an_optimiser_would_ignore_is_refused(given: dict[str, Any], part: str) -> None:
    from lowtide.train.recipe import check_optimizer

    with pytest.raises(ConfigError) as error:
        check_optimizer(OptimizerSettings(**given))
    assert part in str(error.value)
