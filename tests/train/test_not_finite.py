"""Values that are not finite behind a loss that is: no file of a run ever holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import WEIGHTS, assert_tidy, finite_loss, train
from safetensors.torch import load_file

import lowtide as lt
from lowtide.errors import TrainingError
from lowtide.methods import GradSink
from lowtide.train.loop import Trainer

UPDATERS: list[dict[str, Any]] = [
    {},
    {"adapter_dtype": "bfloat16", "optimizer_state": "8bit"},
    {"grad_accumulation_steps": 2},
    {"max_grad_norm": 1.0, "clip_mode": "two-pass"},
    {"max_grad_norm": 1.0, "clip_mode": "per-parameter"},
]
STEP = 4


class LastIsNan:
    """Passes gradients on, and makes one that comes late NaN: others are applied by then."""

    def __init__(self, sink: GradSink) -> None:
        self.sink, self.seen = sink, 0

    def add(self, name: str, grad: torch.Tensor) -> None:
        self.seen += 1
        if "layers.0.self_attn.q_proj.lora_A" in name:
            assert self.seen > 10
            grad[0, 0] = float("nan")
        self.sink.add(name, grad)


def breaking(patch: pytest.MonkeyPatch) -> None:
    """From now on, the gradients of one update are not all finite, and its loss is."""
    usual = Trainer.update

    def update(self: Trainer, batches: list[lt.Batch], step: int) -> Any:
        if step == STEP:
            method, made = self.method, self.method.step
            patch.setattr(
                method, "step", lambda m, a, b, sink, one: made(m, a, b, LastIsNan(sink), one)
            )
        return usual(self, batches, step)

    patch.setattr(Trainer, "update", update)


@pytest.mark.parametrize("save_every", [1, 2])
@pytest.mark.parametrize("given", UPDATERS)
def test_a_gradient_that_is_nan_reaches_no_file(
    given: dict[str, Any], save_every: int, model: Path, data: Path, tmp_path: Path
) -> None:
    settings = {"iters": 6, "save_every": save_every, "batch_size": 2, **given}
    train(model, data, tmp_path / "whole", **settings)
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        breaking(patch)
        with pytest.raises(TrainingError, match=rf"step {STEP}: the gradient of .* is not finite"):
            train(model, data, out, **settings)
    assert_tidy(out)
    for path in [out / WEIGHTS, *out.glob("checkpoints/*/*.safetensors")]:
        assert all(bool(torch.isfinite(t.float()).all()) for t in load_file(path).values())
    # Half an update was made in memory. What is on the disk goes on as if it had never been.
    lt.train(adapter_path=out, resume=True)
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("given", [{}, {"adapter_dtype": "bfloat16"}])
def test_an_adapter_that_is_not_finite_is_not_saved(
    given: dict[str, Any], value: float, model: Path, data: Path, tmp_path: Path
) -> None:
    usual = Trainer.update

    def update(self: Trainer, batches: list[lt.Batch], step: int) -> Any:
        made = usual(self, batches, step)
        if step == STEP:  # the last one: no loss is computed with it before it is saved
            self.adapter.parameters[name][0, 0] = value
        return made

    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", update)
        with pytest.raises(TrainingError, match=r"up_proj.* not finite.*Go on from step 3"):
            train(model, data, out, save_every=1, iters=STEP, **given)
    assert_tidy(out)
    assert finite_loss(model, data, out) < 20
