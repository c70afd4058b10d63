"""DoRA, rsLoRA, and ranks and alphas by module, on every family of the registry."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lowtide as lt
from lowtide.check.conformance import (
    LENGTHS,
    Example,
    hf_logits,
    labels_of,
    peft_gradients,
    peft_model,
    random_adapter,
    random_ids,
    relative,
)
from lowtide.methods import MethodOptions, get_method

# As in test_conformance.py: float32 in transformers' float64 models, and float64's own rounding.
TRANSFORMERS, EXACT, NOISE = 1e-5, 1e-9, 2.0
PATTERNS = {r"layers\.0\..*": 5, "down_proj": 2}
CONFIG = lt.LoraConfig(
    r=3, use_dora=True, use_rslora=True, rank_pattern=PATTERNS, alpha_pattern={"o_proj": 5.0}
)
WAYS = {
    "mesp": ("mesp", {}),
    "all kept, h too": ("mesp", {"keep_blocks": 2, "recompute_h": False}),
    "mebp": ("mebp", {}),
}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_every_exact_way_gives_autograds_gradients(example: Example, dropout: float) -> None:
    model = example.load()
    adapter = random_adapter(model, lt.LoraConfig(**{**vars(CONFIG), "lora_dropout": dropout}))
    ids = random_ids(model.spec.vocab_size, LENGTHS)
    batch = lt.Batch.from_sequences(ids, labels_of(ids))
    truth = lt.gradients(model, adapter, batch, "autograd", dropout_seed=7).grads
    for way, (name, options) in WAYS.items():
        method = get_method(name, MethodOptions(**options))
        ours = lt.gradients(model, adapter, batch, method, dropout_seed=7).grads
        assert max(relative(ours[n], grad) for n, grad in truth.items()) <= EXACT, way


def test_gradients_and_logits_are_those_of_peft(
    family: str, written: Callable[[tuple[str, int]], Example], tmp_path: Path
) -> None:
    example = written((family, 0))
    wide, narrow = example.load(), example.load(torch.float32)
    random_adapter(narrow, CONFIG).save(tmp_path)
    adapters = [lt.Adapter.load(tmp_path, model) for model in (wide, narrow)]
    ids = random_ids(wide.spec.vocab_size, LENGTHS)
    batch = lt.Batch.from_sequences(ids, labels_of(ids))
    truth = lt.gradients(wide, adapters[0], batch).grads
    ours = lt.gradients(narrow, adapters[1], batch).grads
    theirs = peft_model(example, tmp_path, torch.float64)
    found = hf_logits(theirs, ids[0])
    assert relative(lt.logits(wide, adapters[0], ids[0]), found) <= TRANSFORMERS
    peft = peft_gradients(theirs, ids)
    peft32 = peft_gradients(peft_model(example, tmp_path, torch.float32), ids)
    assert set(peft) == set(truth)
    assert max(relative(truth[name], grad) for name, grad in peft.items()) <= TRANSFORMERS
    errors = [
        math.hypot(*(float((grads[name].double() - truth[name]).norm()) for name in truth))
        for grads in (ours, peft32)
    ]
    assert errors[0] <= NOISE * errors[1]
