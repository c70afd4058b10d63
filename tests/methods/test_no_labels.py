"""A batch may come without a label (a micro-batch among others) and then adds nothing."""

from __future__ import annotations

import pytest
import torch

import lowtide as lt
from lowtide.demo.assets import asset_dir
from lowtide.methods import METHODS, Step, get_method


class _Sink:
    def __init__(self) -> None:
        self.largest = 0.0

    def add(self, name: str, grad: torch.Tensor) -> None:
        self.largest = max(self.largest, float(grad.abs().max()))


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_without_labels_has_no_loss_and_no_gradient(name: str) -> None:
    model = lt.load_model(asset_dir())
    adapter = lt.Adapter.create(model)
    for parameter in adapter.parameters.values():
        parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    batch = lt.Batch.from_sequences([[5, 6, 7]], [[-100, -100, -100]])
    method, sink = get_method(name), _Sink()
    assert method.loss(model, adapter, batch) == 0.0
    assert method.step(model, adapter, batch, sink, Step(1.0)) == 0.0
    assert sink.largest == 0.0
