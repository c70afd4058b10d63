"""Every kind of adapter in every method: DoRA, scales, ranks by module, some layers only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EPS32, random_adapter, random_batch, relative
from test_exact_methods import WAYS

import lowtide as lt
from lowtide.methods import MethodOptions, get_method
from lowtide.methods.lcsb import Lcsb
from lowtide.methods.mezo import Direction
from lowtide.methods.structured import kept_inputs

LENGTHS = [23, 1, 9, 31]
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora, attention": {"use_dora": True, "target_modules": "q_proj,k_proj,o_proj"},
    "dora, gate and down": {"use_dora": True, "target_modules": "gate_proj,down_proj"},
    "rslora, ranks and alphas by module": {
        "use_rslora": True,
        "use_dora": True,
        "rank_pattern": {"q_proj": 1, r"layers\.1\.mlp\..*": 7},
        "alpha_pattern": {r"(up|o)_proj": 3},
    },
    "the lower layer": {"layers_to_transform": (0,)},
    "the upper layer": {"layers_to_transform": (1,), "use_dora": True},
}


def _config(kind: str, dropout: float = 0.0) -> lt.LoraConfig:
    return lt.LoraConfig(r=3, lora_dropout=dropout, **KINDS[kind])


def _batch() -> lt.Batch:
    return lt.Batch.from_sequences(*random_batch(131, LENGTHS, masked=0.4))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_autograds(
    kind: str, way: str, dropout: float, odd_model: Callable[..., Path]
) -> None:
    for shape in ("llama-biases-llama3", "llama-many-tiles"):
        model = lt.load_model(odd_model(shape), compute_dtype="float64")
        adapter = random_adapter(model, _config(kind, dropout))
        name, options = WAYS[way]
        trained = len(adapter.config.trained_layers(model.spec))
        if options.get("keep_blocks", 0) > trained:  # which is refused
            options = {**options, "keep_blocks": trained}
        method = get_method(name, MethodOptions(**options))
        truth = lt.gradients(model, adapter, _batch(), "autograd", dropout_seed=7)
        assert set(truth.grads) == set(adapter.parameters)
        for _ in range(2):  # the second step finds the buffers of the first
            ours = lt.gradients(model, adapter, _batch(), method, dropout_seed=7)
            assert ours.loss == pytest.approx(truth.loss, rel=1e-12)
            assert max(relative(ours.grads[n], g) for n, g in truth.grads.items()) < 1e-12


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_float32_is_as_near_the_truth_as_autograd_is(
    dropout: float, odd_model: Callable[..., Path]
) -> None:
    """The noise-floor rule over all gradients in one vector, with 16 eps to spare."""
    directory = odd_model("qwen2-gqa3-untied", torch.bfloat16)
    wide, narrow = (lt.load_model(directory, compute_dtype=d) for d in ("float64", "float32"))
    config = _config("rslora, ranks and alphas by module", dropout)
    small = random_adapter(narrow, config)
    same = lt.Adapter(config, {n: p.double() for n, p in small.items()})
    truth, ours, naive = (
        torch.cat([g.double().flatten() for g in found.grads.values()])
        for found in (
            lt.gradients(wide, same, _batch(), "autograd", dropout_seed=7),
            lt.gradients(narrow, small, _batch(), "mesp", dropout_seed=7),
            lt.gradients(narrow, small, _batch(), "autograd", dropout_seed=7),
        )
    )
    assert relative(ours, truth) <= 2 * relative(naive, truth) + 16 * EPS32


@pytest.mark.parametrize("kind", ["dora", "rslora, ranks and alphas by module"])
def test_lcsb_of_all_blocks_is_exact_and_rests_with_fewer(
    kind: str, odd_model: Callable[..., Path]
) -> None:
    model = lt.load_model(odd_model("llama-many-tiles"), compute_dtype="float64")
    adapter = random_adapter(model, _config(kind, 0.3))
    truth = lt.gradients(model, adapter, _batch(), "mesp", dropout_seed=7).grads
    all_blocks = get_method("lcsb", MethodOptions(lcsb_blocks=2))
    ours = lt.gradients(model, adapter, _batch(), all_blocks, dropout_seed=7).grads
    assert all(ours[name].equal(grad) for name, grad in truth.items())
    one = lt.gradients(model, adapter, _batch(), Lcsb(), dropout_seed=7).grads
    assert set(one) == {name for name in truth if ".layers.0." in name}


def test_lcsb_takes_turns_among_the_adapted_blocks(odd_model: Callable[..., Path]) -> None:
    model = lt.load_model(odd_model("llama-many-tiles"))
    adapter = random_adapter(model, _config("the upper layer"))
    for _ in range(2):
        found = lt.gradients(model, adapter, _batch(), "lcsb").grads
        assert set(found) == set(adapter.parameters)


def test_mezo_moves_magnitudes_too(odd_model: Callable[..., Path]) -> None:
    """Its estimate is the slope along z, here with a step short enough, times z."""
    model = lt.load_model(odd_model("qwen2-mqa"), compute_dtype="float64")
    adapter = random_adapter(model, _config("dora"))
    before = {name: p.clone() for name, p in adapter.items()}
    exact = lt.gradients(model, adapter, _batch(), "mesp").grads
    step = 1e-6
    method = get_method("mezo", MethodOptions(zo_eps=step))
    ours = lt.gradients(model, adapter, _batch(), method, seed=3).grads
    assert all(adapter.parameters[name].equal(p) for name, p in before.items())
    z = Direction(adapter, 3, 0)
    # The gradient holds the norms constant and the loss does not: the rest of the slope is theirs.
    moved = [lt.Adapter(adapter.config, {n: p + way * step * z.of(n) for n, p in adapter.items()})
             for way in (1, -1)]  # fmt: skip
    plus, minus = (lt.gradients(model, a, _batch(), "mesp").loss for a in moved)
    slope = (plus - minus) / (2 * step)
    for name, grad in ours.items():
        assert relative(grad, slope * z.of(name)) < 1e-6
    assert abs(sum(float((exact[n] * z.of(n)).sum()) for n in exact) - slope) > 1e-3


def test_nothing_is_kept_or_done_below_the_lowest_adapted_block(
    odd_model: Callable[..., Path],
) -> None:
    model = lt.load_model(odd_model("llama-many-tiles"))
    config = _config("the upper layer")
    layers = config.trained_layers(model.spec)
    assert list(layers) == [1]
    assert kept_inputs(layers) == [1]
    read: list[int] = []
    linears = model.linears

    class Noting(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    model.linears = Noting(linears)
    for method in ("mesp", "mebp"):
        adapter = random_adapter(model, config)
        read.clear()
        lt.gradients(model, adapter, _batch(), method)
        assert list(dict.fromkeys(read)) == [0, 1], method
        assert read[-1] == 1, method
