"""Whole runs: repeatable, stopped without harm, and never a broken adapter on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from runs import assert_tidy, finite_loss, is_untrained, train
from safetensors.torch import load_file, save_file

import lowtide as lt
from lowtide.errors import TrainingError
from lowtide.train.history import StepReport
from lowtide.train.loop import Trainer
from lowtide.train.run import Quiet


@pytest.mark.parametrize("given", [{}, {"lora_dropout": 0.3, "max_grad_norm": 0.5}])
def test_the_same_seed_gives_the_same_bytes(
    model: Path, data: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        train(model, data, tmp_path / name, seed=seed, batch_size=3, **given)
    a, b, c = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c
    configs = [(tmp_path / n / "adapter_config.json").read_bytes() for n in "ab"]
    assert configs[0] == configs[1]


def test_runs_of_exact_methods_agree(model: Path, data: Path, tmp_path: Path) -> None:
    losses = []
    for method in ("mesp", "mebp", "autograd"):
        train(model, data, tmp_path / method, method=method, iters=8, compute_dtype="float64")
        lines = (tmp_path / method / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    assert losses[0] == pytest.approx(losses[2], rel=1e-8)
    assert losses[0][-1] != losses[0][0]


def test_training_learns_and_says_so(model: Path, data: Path, tmp_path: Path) -> None:
    result = train(
        model, data, tmp_path / "out", iters=40, batch_size=4, valid_data=data, steps_per_eval=40
    )
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert first["step"] == 0
    assert result.valid_loss is not None
    assert result.valid_loss < 0.7 * first["valid_loss"]
    assert finite_loss(model, data, tmp_path / "out") == pytest.approx(result.valid_loss, rel=1e-5)


def test_a_rounded_adapter_is_saved_as_it_was_used(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = train(
        model, data, out, iters=12, valid_data=data, steps_per_eval=12,
        adapter_dtype="bfloat16", optimizer_state="8bit",
    )  # fmt: skip
    weights = load_file(out / "adapter_model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert finite_loss(model, data, out) == pytest.approx(result.valid_loss, rel=1e-6)
    saved = (out / "run.yaml").read_text()
    assert "adapter_dtype: bfloat16" in saved
    assert "optimizer_state: 8bit" in saved


@pytest.mark.parametrize("save_every", [1, 100])
def test_a_rate_that_is_far_too_high_leaves_a_good_adapter(
    model: Path, data: Path, tmp_path: Path, save_every: int
) -> None:
    out = tmp_path / "out"
    outcome = small.run(
        "train", "--model", model, "--data", data, "--adapter-path", out, "--optimizer", "sgd",
        "--learning-rate", 1e30, "--save-every", save_every, "--max-seq-length", 32,
    )  # fmt: skip
    assert outcome.code == 1
    assert "lowtide: training stopped at step 2: the loss is nan" in outcome.err
    assert "Lower --learning-rate" in outcome.err
    assert f"The adapter in {out} is that of step 0." in outcome.err
    assert_tidy(out)
    assert finite_loss(model, data, out) < 20
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("valid", [True, False])
def test_the_last_update_is_proved_too(
    model: Path, data: Path, tmp_path: Path, valid: bool
) -> None:
    more = {"valid_data": data} if valid else {}
    with pytest.raises(TrainingError, match="that of step 0"):
        train(model, data, tmp_path / "out", iters=1, optimizer="sgd", learning_rate=1e30, **more)
    assert is_untrained(tmp_path / "out")
    assert_tidy(tmp_path / "out", best=valid)


def test_the_adapter_of_the_last_good_save_is_put_back(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    kept: dict[int, bytes] = {}

    class Breaks(Quiet):
        def on_step(self, report: StepReport) -> None:
            if report.step == 3:
                trainers[-1].adapter.parameters[name].fill_(3e38)  # its products overflow

        def on_save(self, step: int) -> None:
            saved = out / "checkpoints" / f"step-{step}" / "adapter_model.safetensors"
            kept[step] = saved.read_bytes()

    trainers: list[Trainer] = []
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    remember = Trainer.__init__

    def init(self: Trainer, *given: Any) -> None:
        remember(self, *given)
        trainers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__init__", init)
        with pytest.raises(TrainingError, match=r"step 4: the loss is nan.* of step 2\."):
            train(model, data, out, observer=Breaks(), save_every=1, iters=9)
    assert sorted(kept) == [1, 2, 3]
    assert (out / "adapter_model.safetensors").read_bytes() == kept[2]
    assert_tidy(out)


def test_a_model_that_holds_nan_is_found_at_once(model: Path, data: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    out = tmp_path / "out"
    train(model, data, out)
    before = small.tree(out)
    base = ("--model", broken, "--max-seq-length", 32, "--data", data)
    outcome = small.run("train", *base, "--adapter-path", out, "--overwrite")
    assert outcome.code == 1
    assert "training stopped at step 1: the loss is nan" in outcome.err
    assert "see that the weights hold no infinite or NaN values" in outcome.err
    assert f"Nothing was written to {out}" in outcome.err
    assert small.tree(out) == before
    outcome = small.run("train", *base, "--adapter-path", tmp_path / "p" / "q")
    assert outcome.code == 1
    assert not (tmp_path / "p").exists()
    outcome = small.run("eval", *base)
    assert outcome.code == 1
    assert "the loss on this data is nan" in outcome.err
    for temperature in (0, 1):
        outcome = small.run("generate", "--model", broken, "--temperature", temperature)
        assert outcome.code == 1
        assert "the model's output is nan, so no token can be chosen" in outcome.err


def test_the_saved_adapter_is_that_of_the_trainer(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(model, data, out, lora_r=3, target_modules="v_proj,up_proj", lora_alpha=5)
    adapter = lt.Adapter.load(out, lt.load_model(model))
    assert adapter.config.r == 3
    assert adapter.config.scale(0, "self_attn.v_proj") == 5 / 3
    assert len(adapter.parameters) == 2 * 2 * 2
    saved = json.loads((out / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(model)
    assert saved["target_modules"] == ["v_proj", "up_proj"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps(model: Path, data: Path, tmp_path: Path) -> None:
    done = small.run_process(
        "train", "--model", model, "--data", data, "--adapter-path", tmp_path / "out",
        "--iters", 600, "--max-seq-length", 48, "--valid-records", 4, "--steps-per-eval", 150,
        "--save-every", 70, "--batch-size", 2, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    peaks = [json.loads(line)["peak_anon_bytes"] for line in lines if "valid_loss" not in line]
    assert len(peaks) == 600
    assert max(peaks[-100:]) - max(peaks[:100]) < 1_000_000
    assert torch.tensor(peaks).min() > 0
