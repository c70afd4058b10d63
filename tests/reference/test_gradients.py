"""Gradients of every LoRA parameter against autograd and against transformers + peft.

The adapter goes to peft through its files, so that every case also tests the way out and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import (
    EPS32,
    asset,
    float64_throughout,
    peft_gradients,
    random_adapter,
    random_batch,
    relative,
)
from torch import Tensor

import lowtide as lt

LENGTHS = [23, 1, 9, 2, 31]
# Against formulas that are in float64 throughout only float64's rounding is left, 1e-14 here;
# transformers + peft as it is keeps norms and softmax in float32.
EXACT, PEFT = 1e-12, 1e-5


@dataclass(frozen=True)
class Case:
    """A model, an adapter on it, and how much of the labels is masked."""

    model: str
    config: lt.LoraConfig
    masked: float = 0.4
    stored: torch.dtype = torch.float32


def _config(r: int, modules: str = "all-linear", **more: object) -> lt.LoraConfig:
    return lt.LoraConfig(r=r, lora_alpha=16, target_modules=modules, **more)  # type: ignore[arg-type]


CASES = {
    "mqa, r 8": Case("qwen2-mqa", _config(8)),
    "mqa, r 1, nothing masked": Case("qwen2-mqa", _config(1), masked=0.0),
    "mqa, r 64, only q and v": Case("qwen2-mqa", _config(64, "q_proj,v_proj")),
    "groups of 3, untied, r 8": Case("qwen2-gqa3-untied", _config(8), stored=torch.bfloat16),
    "groups of 3, untied, r 64": Case("qwen2-gqa3-untied", _config(64), masked=0.9),
    "biases, llama3 rope, r 1": Case("llama-biases-llama3", _config(1)),
    "biases, llama3 rope, k and down": Case(
        "llama-biases-llama3", _config(8, "k_proj,down_proj", layers_to_transform=(1,))
    ),
    "linear rope, r 8": Case("llama-linear-untied", _config(8), stored=torch.float16),
    "linear rope, o and gate": Case("llama-linear-untied", _config(64, "o_proj,mlp.gate_proj")),
    "many tiles, r 8": Case("llama-many-tiles", _config(8), stored=torch.bfloat16),
    "many tiles, up": Case("llama-many-tiles", _config(1, "up_proj"), masked=0.0),
    "mqa, dora": Case("qwen2-mqa", _config(8, use_dora=True)),
    "biases, dora, r 64, rslora": Case(
        "llama-biases-llama3", _config(64, use_dora=True, use_rslora=True), masked=0.0
    ),
    "many tiles, dora, gate and down": Case(
        "llama-many-tiles", _config(4, "gate_proj,down_proj", use_dora=True), stored=torch.bfloat16
    ),
    "groups of 3, dora, ranks and alphas by module": Case(
        "qwen2-gqa3-untied",
        _config(
            3,
            use_dora=True,
            use_rslora=True,
            rank_pattern={r"layers\.0\..*": 5, "up_proj": 1},
            alpha_pattern={"q_proj": 1.5, r"self_attn\..*": 40},
        ),
    ),
    "linear rope, rslora, the upper layer": Case(
        "llama-linear-untied", _config(6, use_rslora=True, layers_to_transform=(1,))
    ),
}


@dataclass(frozen=True)
class Results:
    """Gradients of one case from everywhere."""

    ours64: lt.methods.Gradients
    autograd64: lt.methods.Gradients
    ours32: lt.methods.Gradients
    peft64: Mapping[str, Tensor]
    peft64_loss: float
    peft64_exact: Mapping[str, Tensor]
    peft32: Mapping[str, Tensor]


def _run(directory: Path, case: Case, scratch: Path, max_id: int) -> Results:
    models = {d: lt.load_model(directory, compute_dtype=d) for d in ("float32", "float64")}
    random_adapter(models["float32"], case.config).save(scratch)
    adapters = {d: lt.Adapter.load(scratch, m) for d, m in models.items()}
    ids, labels = random_batch(max_id, LENGTHS, case.masked, seed=5)
    batch = lt.Batch.from_sequences(ids, labels)

    def ours(dtype: str, method: str) -> lt.methods.Gradients:
        return lt.gradients(models[dtype], adapters[dtype], batch, method)

    loss, peft64 = peft_gradients(directory, scratch, torch.float64, ids, labels)
    with float64_throughout():
        _, exact = peft_gradients(directory, scratch, torch.float64, ids, labels)
    _, peft32 = peft_gradients(directory, scratch, torch.float32, ids, labels)
    return Results(
        ours64=ours("float64", "mesp"),
        autograd64=ours("float64", "autograd"),
        ours32=ours("float32", "mesp"),
        peft64=peft64,
        peft64_loss=loss,
        peft64_exact=exact,
        peft32=peft32,
    )


def _worst(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of any parameter. Both must have the same parameters."""
    assert set(ours) == set(truth)
    assert all(float(t.norm()) > 0 for t in truth.values())
    return max((relative(ours[name], truth[name]), name) for name in truth)


def _distance(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """The norm of the difference over all parameters."""
    return sum(float((ours[n].double() - truth[n]).norm()) ** 2 for n in truth) ** 0.5


def _assert_all_agree(results: Results, shapes: Mapping[str, Tensor]) -> None:
    truth = results.ours64.grads
    assert {n: g.shape for n, g in truth.items()} == {n: p.shape for n, p in shapes.items()}
    assert results.ours64.loss == pytest.approx(results.autograd64.loss, rel=1e-12)
    assert results.ours64.loss == pytest.approx(results.peft64_loss, rel=PEFT)
    for theirs, tolerance in (
        (results.autograd64.grads, EXACT),
        (results.peft64, PEFT),
        (results.peft64_exact, EXACT),
    ):
        worst, name = _worst(truth, theirs)
        assert worst <= tolerance, f"{name}: {worst:.2e}"

    ours, theirs = (_distance(g, truth) for g in (results.ours32.grads, results.peft32))
    assert ours <= 2 * theirs, f"float32 error {ours:.2e}, transformers + peft {theirs:.2e}"
    for name, exact in truth.items():
        error, peer = (
            float((g[name].double() - exact).norm()) for g in (results.ours32.grads, results.peft32)
        )
        # One parameter's error is a draw of luck on either side, between 5 and 30 eps of its
        # gradient in these few blocks; the sum over all parameters above needs no such allowance.
        assert error <= 2 * peer + 16 * EPS32 * float(exact.norm()), (
            f"{name}: float32 error {error:.2e}, transformers + peft {peer:.2e}"
        )


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_on_odd_shapes(
    name: str, odd_model: Callable[..., Path], tmp_path: Path
) -> None:
    case = CASES[name]
    directory = odd_model(case.model, case.stored)
    results = _run(directory, case, tmp_path, max_id=131)
    model = lt.load_model(directory)
    _assert_all_agree(results, random_adapter(model, case.config).parameters)


@pytest.mark.parametrize("twin", ["hf-llama", "hf-qwen2-zero-bias"])
def test_every_gradient_on_a_real_pretrained_model(twin: str, tmp_path: Path) -> None:
    directory = asset(f"models/stories260K/{twin}")
    case = Case(twin, _config(8))
    results = _run(directory, case, tmp_path, max_id=512)
    model = lt.load_model(directory)
    _assert_all_agree(results, random_adapter(model, case.config).parameters)


@pytest.mark.parametrize("name", ["qwen2-mqa", "llama-biases-llama3", "llama-many-tiles"])
def test_dropout_is_exact_too(name: str, odd_model: Callable[..., Path]) -> None:
    """The recompute drops what the forward dropped, in every tile of the MLP."""
    model = lt.load_model(odd_model(name), compute_dtype="float64")
    adapter = random_adapter(model, _config(8, lora_dropout=0.2))
    ids, labels = random_batch(131, LENGTHS, 0.3)
    batch = lt.Batch.from_sequences(ids, labels)

    def gradients(method: str, seed: int | None) -> lt.methods.Gradients:
        return lt.gradients(model, adapter, batch, method, dropout_seed=seed)

    for seed in (3, 2**40 + 1):
        ours, truth = gradients("mesp", seed), gradients("autograd", seed)
        assert ours.loss == pytest.approx(truth.loss, rel=1e-12)
        worst, parameter = _worst(ours.grads, truth.grads)
        assert worst <= EXACT, f"{parameter}: {worst:.2e}"
    assert _worst(gradients("mesp", 3).grads, gradients("mesp", 4).grads)[0] > 1e-3
    assert _worst(gradients("mesp", 3).grads, gradients("mesp", None).grads)[0] > 1e-3
