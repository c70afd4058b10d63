"""LCSB: exact for the blocks that are up as far as the residual path carries the signal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import random_adapter, random_batch, relative

import lowtide as lt
from lowtide.errors import ConfigError
from lowtide.methods import MethodOptions, Step, get_method
from lowtide.methods.lcsb import blocks_of_turn
from lowtide.model.adapter import Adapter
from lowtide.model.batch import IGNORED
from lowtide.model.decoder import Decoder
from lowtide.model.reference import PLAIN, reference_block, reference_head


@pytest.mark.parametrize(("num_layers", "per_step"), [(24, 12), (24, 5), (7, 3), (5, 1), (4, 4)])
def test_every_block_is_up_equally_often(num_layers: int, per_step: int) -> None:
    turns = [blocks_of_turn(num_layers, per_step, turn) for turn in range(num_layers)]
    assert all(len(turn) == per_step and turn == sorted(set(turn)) for turn in turns)
    counts = Counter(layer for turn in turns for layer in turn)
    assert set(counts.values()) == {per_step}
    assert len(counts) == num_layers


@pytest.fixture
def model(odd_model: Callable[..., Path]) -> Decoder:
    return lt.load_model(odd_model("llama-many-tiles"), compute_dtype="float64")


class _Keep:
    def __init__(self) -> None:
        self.grads: dict[str, torch.Tensor] = {}

    def add(self, name: str, grad: torch.Tensor) -> None:
        self.grads[name] = grad


def _with_residual_past(
    model: Decoder, adapter: Adapter, batch: lt.Batch, up: list[int]
) -> dict[str, torch.Tensor]:
    """Autograd over a forward in which blocks that rest are `x + (block(x) - x).detach()`."""
    leaves = {name: p.detach().requires_grad_() for name, p in adapter.items()}
    tracked = Adapter(adapter.config, leaves)
    x = model.embedding.whole()[batch.ids].to(model.compute_dtype)
    for layer in range(model.spec.num_layers):
        y = reference_block(model, tracked, layer, x, batch, 5)
        x = y if layer in up else x + (y - x).detach()
    logits = reference_head(model, x, PLAIN)
    loss = torch.nn.functional.cross_entropy(logits, batch.targets, ignore_index=IGNORED)
    wanted = [name for name in leaves if any(f".layers.{layer}." in name for layer in up)]
    grads = torch.autograd.grad(loss, [leaves[name] for name in wanted])
    return dict(zip(wanted, grads, strict=True))


def test_gradients_are_those_of_the_residual_path(model: Decoder) -> None:
    adapter = random_adapter(model, lt.LoraConfig(r=3, lora_dropout=0.2))
    batch = lt.Batch.from_sequences(*random_batch(131, [23, 9], masked=0.3))
    for per_step in range(1, model.spec.num_layers + 1):
        method = get_method("lcsb", MethodOptions(lcsb_blocks=per_step))
        for turn in range(model.spec.num_layers):
            up = blocks_of_turn(model.spec.num_layers, per_step, turn)
            sink = _Keep()
            step = Step(1.0 / batch.n_tokens, dropout_seed=5, number=turn)
            method.step(model, adapter, batch, sink, step)
            truth = _with_residual_past(model, adapter, batch, up)
            assert set(sink.grads) == set(truth)
            assert max(relative(sink.grads[n], g) for n, g in truth.items()) < 1e-12


def test_only_the_blocks_that_are_up_move(odd_model: Callable[..., Path], model: Decoder) -> None:
    adapter = random_adapter(model, lt.LoraConfig(r=3))
    batch = lt.Batch.from_sequences(*random_batch(131, [9]))
    method = get_method("lcsb", MethodOptions(lcsb_blocks=1))
    grads = lt.gradients(model, adapter, batch, method).grads
    assert set(grads) == set(adapter.of_layer(0))
    assert all(".layers.0." in name for name in grads)
    assert len(grads) == 14


def test_more_blocks_than_there_are_is_refused(model: Decoder) -> None:
    method = get_method("lcsb", MethodOptions(lcsb_blocks=99))
    adapter = random_adapter(model, lt.LoraConfig(r=3))
    with pytest.raises(ConfigError, match=r"--lcsb-blocks is 99, and the model has \d blocks"):
        lt.gradients(model, adapter, lt.Batch.from_sequences([[1, 2]]), method)
