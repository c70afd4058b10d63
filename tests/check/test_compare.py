"""Errors and cosines of gradients whose values are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowtide.check.compare import compare, cosine, module_of, relative_errors

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q1 = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
DOWN = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"


def grads(**values: list[float]) -> dict[str, Tensor]:
    names = {"q": Q, "q1": Q1, "down": DOWN}
    return {names[key]: torch.tensor(value) for key, value in values.items()}


TRUTH = grads(q=[3.0, 4.0], q1=[0.0, 2.0], down=[1.0, 0.0])


def test_the_error_is_relative_to_the_parameters_own_norm() -> None:
    found = relative_errors(grads(q=[3.0, 4.5], q1=[0.0, 2.0], down=[1.0, 0.25]), TRUTH)
    assert found == {Q: 0.1, Q1: 0.0, DOWN: 0.25}


def test_next_to_no_gradient_is_measured_against_the_whole() -> None:
    truth = grads(q=[3.0, 4.0], down=[1e-9, 0.0])
    found = relative_errors(grads(q=[3.0, 4.0], down=[0.0, 1e-6]), truth)
    assert found[DOWN] == pytest.approx(2e-7, rel=1e-3)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_is_infinitely_wrong(wrong: float) -> None:
    ours = grads(q=[3.0, wrong], q1=[0.0, 2.0], down=[1.0, 0.0])
    found = compare(ours, TRUTH, dict.fromkeys(TRUTH, 1.0), precision="float32", against="truth")
    assert found.whole.worst_relative_error == math.inf
    assert list(found.exceeded) == [Q]


def test_a_gradient_where_the_truth_has_none_at_all() -> None:
    zero = {name: torch.zeros_like(grad) for name, grad in TRUTH.items()}
    assert set(relative_errors(zero, zero).values()) == {0.0}
    assert set(relative_errors(TRUTH, zero).values()) == {math.inf}


def test_modules_gather_all_layers_and_each_parameter_has_its_bound() -> None:
    ours = grads(q=[3.0, 4.5], q1=[0.0, 2.0], down=[1.0, 0.25])
    bounds = {Q: 0.05, Q1: 0.0, DOWN: 0.3}
    found = compare(ours, TRUTH, bounds, precision="float32", against="truth")
    assert list(found.modules) == ["q_proj", "down_proj"]
    q = found.modules["q_proj"]
    assert (q.worst_parameter, q.worst_relative_error) == (Q, 0.1)
    # Of (3, 4.5, 0, 2) with (3, 4, 0, 2).
    assert q.cosine == pytest.approx((9 + 18 + 4) / math.sqrt((9 + 20.25 + 4) * 29), rel=1e-14)
    assert (found.whole.worst_parameter, found.bound) == (DOWN, 0.3)
    assert found.exceeded == {Q: (0.1, 0.05)}
    assert not found.passed


def test_cosine() -> None:
    assert cosine(TRUTH, TRUTH) == pytest.approx(1.0, abs=1e-15)
    assert cosine({name: -grad for name, grad in TRUTH.items()}, TRUTH) == pytest.approx(-1.0)
    # What ours lacks counts as zeros.
    assert cosine({Q: TRUTH[Q]}, TRUTH) == pytest.approx(5 / math.sqrt(30), rel=1e-14)
    zero = {name: torch.zeros_like(grad) for name, grad in TRUTH.items()}
    assert (cosine(zero, TRUTH), cosine(zero, zero)) == (0.0, 1.0)


def test_module_of() -> None:
    assert (module_of(Q), module_of(DOWN)) == ("q_proj", "down_proj")
