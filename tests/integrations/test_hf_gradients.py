"""Losses and gradients of a patched model against transformers and PEFT under autograd."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_small import grads_of, rows, small_model, step, with_lora, worst
from torch import nn

from lowtide.check.conformance import Example
from lowtide.integrations.hf import patch
from lowtide.integrations.hf.inner import read_inner, spec_of
from lowtide.model.families import FAMILIES
from lowtide.ops.dropout import dropout_scale

# As everywhere: transformers keeps norms, rotary angles and softmax in float32.
BOUND = 1e-5
EXAMPLES = [
    pytest.param(config, id=f"{name}-{number}")
    for name, family in FAMILIES.items()
    for number, config in enumerate(family.examples)
]


def ids_of(model: Any, shape: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    labels = ids.masked_fill(torch.arange(shape[1]) % 3 == 0, -100)
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("config", EXAMPLES)
def test_every_family(config: dict[str, Any], tmp_path: Path) -> None:
    example = Example.write(tmp_path, config)
    wide, narrow = (with_lora(example, dtype) for dtype in (torch.float64, torch.float32))
    calls = [ids_of(wide, (2, 23), seed) for seed in range(4)]
    truth, theirs = ([step(model, **call) for call in calls] for model in (wide, narrow))
    with patch(wide), patch(narrow):
        ours, narrow_ours = ([step(model, **call) for call in calls] for model in (wide, narrow))
    for (loss, grads), (their_loss, their_grads) in zip(ours, truth, strict=True):
        assert math.isclose(loss, their_loss, rel_tol=BOUND)
        assert worst(grads, their_grads) < BOUND
    assert _distance(narrow_ours, ours) <= 2 * _distance(theirs, ours)


def _distance(found: list[Any], truth: list[Any]) -> float:
    parts = [
        float((grads[name].double() - true[name]).norm())
        for (_, grads), (_, true) in zip(found, truth, strict=True)
        for name in true
    ]
    return math.hypot(*parts)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_not_computed_and_changes_nothing(side: str, tmp_path: Path) -> None:
    model = small_model(tmp_path, torch.float64)
    call = rows([19, 4, 11], 21)
    if side == "left":
        call = {name: part.flip(1) for name, part in call.items()}
        first = call["attention_mask"].argmax(1)
        call["labels"][torch.arange(3), first] = -100  # padding predicts nothing
    items = int((call["labels"][:, 1:] != -100).sum())
    model.zero_grad(set_to_none=True)
    loss = 0.0
    for ids, mask, labels in zip(*call.values(), strict=True):
        row = {"input_ids": ids[mask > 0][None], "labels": labels[mask > 0][None]}
        alone = model(**row, num_items_in_batch=items).loss
        alone.backward()
        loss += float(alone.detach())
    theirs = grads_of(model)
    with patch(model):
        ours = step(model, **call)
    assert math.isclose(ours[0], loss, rel_tol=BOUND)
    assert worst(ours[1], theirs) < BOUND


def test_packed_sequences_are_apart(tmp_path: Path) -> None:
    model = small_model(tmp_path, torch.float64)
    call = rows([30, 30])
    del call["attention_mask"]
    places = [*range(11), *range(1), *range(18)]
    call["position_ids"] = torch.tensor([places, [*range(25), *range(5)]])
    call["use_cache"] = False  # with a cache, transformers does not look at them
    loss, theirs = step(model, **call)
    apart = step(model, **{**call, "position_ids": torch.arange(30).expand(2, 30)})
    assert worst(theirs, apart[1]) > 1e-2  # positions do make a difference
    with patch(model):
        ours = step(model, **call)
    assert math.isclose(ours[0], loss, rel_tol=BOUND)
    assert worst(ours[1], theirs) < BOUND


def test_gradients_of_several_calls_add_up_by_the_number_of_items(tmp_path: Path) -> None:
    model = small_model(tmp_path, torch.float64)
    calls = [rows([9, 17], seed=1), rows([5, 3], seed=2)]
    items = sum(int((call["labels"][:, 1:] != -100).sum()) for call in calls)
    found = []
    for patched in (False, True):
        handle = patch(model) if patched else None
        model.zero_grad(set_to_none=True)
        total = sum(model(**call, num_items_in_batch=torch.tensor(items)).loss for call in calls)
        total.backward()
        found.append((float(total.detach()), grads_of(model)))
        if handle is not None:
            handle.unpatch()
    assert math.isclose(found[0][0], found[1][0], rel_tol=BOUND)
    assert worst(found[1][1], found[0][1]) < BOUND


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 3}},
        {"target_modules": ["v_proj", "down_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*\.(0|2)\.mlp\.(gate|up)_proj"},
    ],
    ids=["dora", "patterns", "one-layer", "expression"],
)
def test_kinds_of_lora(lora: dict[str, Any], tmp_path: Path) -> None:
    model = small_model(tmp_path, torch.float64, **lora)
    call = rows([12, 7])
    loss, theirs = step(model, **call)
    with patch(model):
        ours = step(model, **call)
    assert math.isclose(ours[0], loss, rel_tol=BOUND)
    assert worst(ours[1], theirs) < BOUND


def test_scales_are_read_at_each_call(tmp_path: Path) -> None:
    model = small_model(tmp_path, torch.float64)
    call = rows([12, 7])
    with patch(model):
        before = step(model, **call)
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", 3.0)
        ours = step(model, **call)
    loss, theirs = step(model, **call)
    assert before[0] != ours[0]
    assert math.isclose(ours[0], loss, rel_tol=BOUND)
    assert worst(ours[1], theirs) < BOUND


class _Masked(nn.Module):
    """Dropout with lowtide's mask of a seed."""

    def __init__(self, p: float, seed: int) -> None:
        super().__init__()
        self.p, self.seed = p, seed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return (flat * dropout_scale(flat, self.p, self.seed)).view(x.shape)


def test_dropout_is_lowtides_own_mask_from_torchs_generator(tmp_path: Path) -> None:
    model = small_model(tmp_path, torch.float64, lora_dropout=0.3).train()
    call = {name: part for name, part in rows([15, 15]).items() if name != "attention_mask"}
    with patch(model):
        torch.manual_seed(11)
        ours, again = step(model, **call), step(model, **call)
        torch.manual_seed(11)
        repeated = step(model, **call)
    assert ours[0] == repeated[0] != again[0]
    torch.manual_seed(11)
    seed = int(torch.randint(1 << 62, (1,)))
    adapter = read_inner(model, spec_of(model.get_base_model())).adapter
    assert adapter is not None
    for (layer, linear), module in adapter._modules.items():
        own = adapter.lora(layer, linear, seed)
        assert own is not None
        module.lora_dropout["default"] = _Masked(0.3, own.seed)
    loss, theirs = step(model, **call)
    assert math.isclose(ours[0], loss, rel_tol=BOUND)
    assert worst(ours[1], theirs) < BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_computed_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small_model(tmp_path, dtype)
    call = rows([15, 9])
    with patch(model):
        loss, ours = step(model, **call)
    assert {grad.dtype for grad in ours.values()} == {torch.float32}
    wide = model.double()  # the same rounded weights
    true_loss, truth = step(wide, **call)
    assert math.isclose(loss, true_loss, rel_tol=BOUND)
    assert worst({name: grad.double() for name, grad in ours.items()}, truth) < 1e-4


def test_autocast_changes_nothing_inside(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    call = rows([15, 9])
    with patch(model):
        plain = step(model, **call)
        with torch.autocast("cpu", torch.bfloat16):
            inside = step(model, **call)
    assert plain[0] == inside[0]
    assert worst(inside[1], plain[1]) == 0.0


def test_a_call_without_labels_in_training_has_the_models_own_logits(tmp_path: Path) -> None:
    model = small_model(tmp_path, torch.float64).train()
    call = rows([19, 4, 11], 21)
    labels = call.pop("labels")

    def run() -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        logits = model(**call).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        (loss + 1e-3 * logits[call["attention_mask"].bool()].square().mean()).backward()
        return float(loss.detach()), grads_of(model)

    loss, theirs = run()
    with patch(model):
        ours = run()
    assert ours[0] != loss  # not the same code
    assert math.isclose(ours[0], loss, rel_tol=BOUND)
    assert worst(ours[1], theirs) < BOUND


def test_frozen_matrices_get_no_gradient(tmp_path: Path) -> None:
    model = small_model(tmp_path, torch.float64)
    for name, parameter in model.named_parameters():
        if "layers.0" in name or "lora_A" in name:
            parameter.requires_grad_(False)
    call = rows([12, 7])
    _, theirs = step(model, **call)
    with patch(model):
        _, ours = step(model, **call)
    assert worst(ours, theirs) < BOUND
    assert json.dumps(sorted(ours)) == json.dumps(sorted(theirs))
