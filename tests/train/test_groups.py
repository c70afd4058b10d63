"""LoRA+ and weight decay groups, against PEFT's optimiser and torch.optim's groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import hf_model

import lowtide as lt
from lowtide.errors import ConfigError
from lowtide.train.groups import Groups
from lowtide.train.optim import OPTIMIZERS
from lowtide.train.recipe import OptimizerSettings

RATE, DECAY = 1e-2, 0.3
TORCH: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
    "adafactor": torch.optim.Adafactor,
}


@pytest.mark.parametrize("name", list(TORCH))
def test_lora_plus_is_that_of_peft(name: str, model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from peft.optimizers import create_loraplus_optimizer

    decoder = lt.load_model(model, "float64")
    adapter = lt.Adapter.create(decoder, lt.LoraConfig(r=3), seed=5)
    adapter.save(tmp_path, str(model))
    peft = PeftModel.from_pretrained(
        hf_model(model, torch.float64), tmp_path, is_trainable=True, autocast_adapter_dtype=False
    )
    truth = {n.replace(".default.", "."): p for n, p in peft.named_parameters() if p.requires_grad}
    assert truth.keys() == adapter.parameters.keys()
    for n, p in truth.items():  # what was saved is in float64 too, and yet: the same start
        p.data.copy_(adapter.parameters[n])
    reference = create_loraplus_optimizer(
        peft, TORCH[name], lr=RATE, loraplus_lr_ratio=16.0, loraplus_weight_decay=DECAY
    )
    own = {"adafactor_relative": True} if name == "adafactor" else {}
    settings = OptimizerSettings(
        optimizer=name, learning_rate=RATE, loraplus_lr_ratio=16.0, weight_decay=DECAY, **own
    )
    optimizer = OPTIMIZERS[name](settings, adapter.parameters)
    generator = torch.Generator().manual_seed(7)
    for step in range(1, 6):
        optimizer.start(step, RATE)
        for n, p in truth.items():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            optimizer.update(n, adapter.parameters[n], p.grad.clone())
        reference.step()
    for n, p in truth.items():
        torch.testing.assert_close(adapter.parameters[n], p.detach(), rtol=1e-12, atol=1e-14)


def names(decoder: lt.Decoder) -> dict[str, torch.Tensor]:
    return lt.Adapter.create(decoder, lt.LoraConfig(r=2)).parameters


@pytest.mark.parametrize(
    ("asked", "decays"),
    [
        ("all", lambda name: True),
        ("lora_B", lambda name: "lora_B" in name),
        ("lora_A", lambda name: "lora_A" in name),
        ("q_proj, v_proj", lambda name: "q_proj" in name or "v_proj" in name),
        ("q_proj.lora_B", lambda name: "q_proj" in name and "lora_B" in name),
        ("mlp,layers.1", lambda name: ".mlp." in name or "layers.1." in name),
    ],
)
def test_what_decays_is_named_by_parts_of_names(
    asked: str, decays: Any, decoder: lt.Decoder
) -> None:
    parameters = names(decoder)
    groups = Groups(OptimizerSettings(weight_decay=DECAY, weight_decay_on=asked), parameters)
    for name in parameters:
        assert groups.rates(name, RATE) == (RATE, DECAY if decays(name) else 0.0), name
    found = {groups.rates(name, RATE).weight_decay for name in parameters}
    assert found == ({DECAY} if asked == "all" else {DECAY, 0.0})


def test_a_group_is_that_of_torch(decoder: lt.Decoder) -> None:
    ours = {name: p.clone() for name, p in names(decoder).items()}
    truth = {name: torch.nn.Parameter(p.clone()) for name, p in ours.items()}
    reference = torch.optim.AdamW(
        [
            {"params": [p for n, p in truth.items() if "lora_A" in n], "weight_decay": DECAY},
            {"params": [p for n, p in truth.items() if "lora_B" in n], "weight_decay": 0.0},
        ],
        lr=RATE,
    )
    settings = OptimizerSettings(weight_decay=DECAY, weight_decay_on="lora_A", learning_rate=RATE)
    optimizer = OPTIMIZERS["adamw"](settings, ours)
    for step in (1, 2, 3):
        optimizer.start(step, RATE)
        for name, p in truth.items():
            p.grad = torch.full_like(p, 0.1 * step)
            optimizer.update(name, ours[name], p.grad.clone())
        reference.step()
    for name, p in truth.items():
        torch.testing.assert_close(ours[name], p.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("asked", ["lora_C", "q_proj,lora", "q", ","])
def test_a_part_that_no_name_has_is_refused(asked: str, decoder: lt.Decoder) -> None:
    with pytest.raises(ConfigError) as error:
        Groups(OptimizerSettings(weight_decay=DECAY, weight_decay_on=asked), names(decoder))
    text = str(error.value)
    assert "is no part of a parameter's name. Choose 'all', or among self_attn, q_proj, " in text
    assert repr(asked.split(",")[-1] or asked) in text
    assert "lora_B" in text
