"""Recipes as commands: schedules, epochs, early stopping, and settings that are refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import small
from runs import train

import lowtide as lt
from lowtide.errors import ConfigError
from lowtide.train.history import StepReport
from lowtide.train.observers import Quiet
from lowtide.train.recipe import RecipeSettings, check_recipe
from lowtide.train.schedule import SCHEDULES
from lowtide.train.stopping import EarlyStopping


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.parametrize("kind", list(SCHEDULES))
def test_the_rate_in_use_is_in_the_metrics(
    kind: str, model: Path, data: Path, tmp_path: Path
) -> None:
    train(model, data, tmp_path / "out", iters=6, lr_schedule=kind, warmup_steps=2)
    rows = metrics(tmp_path / "out")
    rates = [row["learning_rate"] for row in rows]
    assert rates[:3] == pytest.approx([0.0, 0.005, 0.01])
    if kind == "constant":
        assert rates[3:] == [0.01] * 3
    else:
        assert all(later < earlier for earlier, later in pairwise(rates[2:]))
    for row in rows:
        squares = [norm**2 for norm in row["grad_norms"]]
        assert len(squares) == small.CONFIG["num_hidden_layers"]
        assert row["grad_norm"] == pytest.approx(sum(squares) ** 0.5, rel=1e-3)
        assert row["grad_norm"] > 0


def test_progress_shows_a_rate_that_changes(model: Path, data: Path, tmp_path: Path) -> None:
    flags = ["train", "--model", model, "--data", data, "--max-seq-length", 32, "--iters", 3]
    plain = small.run(*flags, "--adapter-path", tmp_path / "a")
    assert "  rate " not in plain.out
    falling = small.run(*flags, "--adapter-path", tmp_path / "b", "--lr-schedule", "linear")
    assert "step 1/3  loss" in falling.out
    assert "rate 1.00e-04" in falling.out
    assert "rate 3.33e-05" in falling.out


def test_epochs_go_through_the_data(model: Path, data: Path, tmp_path: Path) -> None:
    done = small.run(
        "train", "--model", model, "--data", data, "--adapter-path", tmp_path / "out",
        "--epochs", 1.5, "--batch-size", 5, "--max-seq-length", 32, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.document["steps"] == 8  # 24 records: 36 of them in batches of 5
    assert "step 8/8" in done.err
    saved = (tmp_path / "out" / "run.yaml").read_text()
    assert "epochs: 1.5" in saved
    assert "iters: null" in saved


def test_a_warm_up_longer_than_the_epochs_is_refused(
    model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--warmup-steps 24 is not less than the 24 updates"):
        lt.train(
            model=model, data=data, adapter_path=tmp_path / "out", epochs=1, warmup_steps=24,
            max_seq_length=32,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_patience_ends_a_run_that_does_not_improve(model: Path, data: Path, tmp_path: Path) -> None:
    outcome = small.run(
        "train", "--model", model, "--data", data, "--adapter-path", tmp_path / "out",
        "--iters", 50, "--valid-records", 4, "--steps-per-eval", 2, "--max-seq-length", 32,
        "--learning-rate", 1e-9, "--early-stopping-patience", 3, "--early-stopping-min-delta",
        0.01, "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert outcome.document["stopped_early"] is True
    assert outcome.document["steps"] == 6
    assert "stopped early, after 3 validations without improvement: 6 updates" in outcome.err
    assert lt.Adapter.load(tmp_path / "out", lt.load_model(model)).n_parameters > 0


def test_patience_lets_a_run_that_improves_go_on(model: Path, data: Path, tmp_path: Path) -> None:
    result = train(
        model, data, tmp_path / "out", iters=12, valid_data=data, steps_per_eval=2,
        early_stopping_patience=1,
    )  # fmt: skip
    assert result.steps == 12
    assert not result.stopped_early


class Stops(Quiet):
    """Ends the run as if the process had died after an update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, report: StepReport) -> None:
        if report.step == self.step:
            raise RuntimeError("died")


@pytest.mark.parametrize("step", [1, 3, 5, 6])
def test_patience_counts_on_after_a_resume(
    step: int, model: Path, data: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        "valid_data": data, "steps_per_eval": 2, "save_every": 1, "iters": 30,
        "learning_rate": 1e-9, "early_stopping_patience": 3, "early_stopping_min_delta": 0.01,
    }  # fmt: skip
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="died"):
        train(model, data, out, observer=Stops(step), **given)
    result = lt.train(adapter_path=out, resume=True)
    assert (result.steps, result.stopped_early) == (6, True)
    again = lt.train(adapter_path=out, resume=True)
    assert (again.steps, again.stopped_early) == (6, True)
    more = lt.train(adapter_path=out, resume=True, early_stopping_patience=5)
    assert (more.steps, more.stopped_early) == (10, True)


@pytest.mark.parametrize(
    ("patience", "delta", "losses", "due_after"),
    [
        (None, 0.0, [3.0, 4.0, 5.0, 6.0], None),
        (1, 0.0, [3.0, 2.0, 2.0], 3),  # equal is no improvement
        (2, 0.0, [3.0, 3.1, 2.9, 3.0, 3.0], 5),  # the count starts again
        (2, 0.5, [3.0, 2.7, 2.4, 2.2, 2.0], 5),  # 2.4 is 0.6 below the best; 2.0 is 0.4
    ],
)
def test_when_patience_ends(
    patience: int | None, delta: float, losses: list[float], due_after: int | None
) -> None:
    stopping = EarlyStopping(patience, delta)
    due = []
    for number, loss in enumerate(losses, start=1):
        stopping.see(loss)
        due += [number] if stopping.due else []
    assert (due[0] if due else None) == due_after


def test_patience_without_validation_data_is_refused(
    model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"there is no validation data\. Give --valid-data or"):
        train(model, data, tmp_path / "out", early_stopping_patience=2)
    assert not (tmp_path / "out").exists()


def test_patience_that_no_validation_can_end_is_refused(
    model: Path, data: Path, tmp_path: Path
) -> None:
    given = {"valid_data": data, "early_stopping_patience": 3, "steps_per_eval": 2}
    with pytest.raises(ConfigError, match=r"come every 2 \(--steps-per-eval\), 2 before the end"):
        train(model, data, tmp_path / "out", iters=6, **given)
    train(model, data, tmp_path / "out", iters=7, **given)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"iters": 5, "epochs": 1.0}, "--iters and --epochs both say how long to train"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "--warmup-steps and --warmup-ratio both"),
        ({"min_lr": 1e-5}, "--lr-schedule constant has no use for it"),
        (
            {"min_lr": 1e-5, "lr_schedule": "inverse_sqrt"},
            "--lr-schedule inverse_sqrt has no use for it",
        ),
        (
            {"min_lr": 1e-2, "lr_schedule": "cosine"},
            "--min-lr 0.01 is not below --learning-rate 0.001",
        ),
        ({"clip_mode": "two-pass"}, "and --max-grad-norm is not given. Give both or neither."),
        ({"clip_mode": "per-parameter"}, "--clip-mode per-parameter says how to clip"),
        (
            {"clip_mode": "two-pass", "max_grad_norm": 1.0, "grad_accumulation_steps": 4},
            "--grad-accumulation-steps 4 sums them first",
        ),
        ({"early_stopping_min_delta": 0.1}, "of no use without --early-stopping-patience"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(given: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_recipe(RecipeSettings(**given), 1e-3)
    assert part in str(error.value)


def test_all_problems_are_told_at_once() -> None:
    given: dict[str, Any] = {"iters": 5, "epochs": 1.0, "min_lr": 1.0, "clip_mode": "two-pass"}
    with pytest.raises(ConfigError) as error:
        check_recipe(RecipeSettings(**given), 1e-3)
    assert str(error.value).count("\n") == 3


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--epochs", "0"], ["epochs = 0", "expected more than 0"]),
        (["--iters", "0"], ["iters = 0", "expected at least 1"]),
        (["--lr-schedule", "cosin"], ["did you mean 'cosine'?"]),
        (["--lr-schedule", "constant_with_warmup"], ["here it is constant with --warmup-steps"]),
        (["--lr-schedule", "cosine_with_min_lr"], ["here it is cosine with --min-lr"]),
        (["--warmup-steps", "-1"], ["warmup_steps = -1", "expected at least 0"]),
        (["--warmup-ratio", "1"], ["warmup_ratio = 1.0", "expected at most 0.99"]),
        (["--min-lr=-1e-5"], ["min_lr = -1e-05", "expected at least 0"]),
        (["--max-grad-norm", "0"], ["max_grad_norm = 0.0", "expected more than 0"]),
        (["--clip-mode", "norm"], ["choose accumulate, two-pass, per-parameter"]),
        (["--early-stopping-patience", "0"], ["expected at least 1"]),
        (["--early-stopping-min-delta", "-1"], ["expected at least 0"]),
        (["--loraplus-lr-ratio", "0"], ["expected more than 0"]),
        (["--beta2", "1"], ["beta2 = 1.0", "expected at most 0.999999"]),
        (["--weight-decay-on", ""], ["weight_decay_on is empty"]),
        (["--optimizer", "adamw8bit"], ["here it is adamw with --optimizer-state 8bit"]),
        (["--optimizer", "paged_lion_8bit"], ["here it is lion with --optimizer-state 8bit"]),
        (["--optimizer", "adamw_torch"], ["here it is adamw"]),
        (["--num-train-epochs", "3"], ["did you mean '--epochs'?"]),
        (["--lr-scheduler-type", "cosine"], ["did you mean '--lr-schedule'?"]),
        (["--optim", "adamw"], ["did you mean '--optimizer'?"]),
        (["--iters", "100", "--warmup-steps", "100"], ["not less than the 100 updates"]),
        (["--warmup-steps", "100"], ["not less than the 100 updates"]),
        (["--weight-decay", "0.1", "--weight-decay-on", "lora_C"], ["'lora_C' is no part of"]),
        (["--iters", "5", "--epochs", "2"], ["Give one of them."]),
    ],
)
def test_the_command_line_says_what_is_wrong(
    flags: list[str], parts: list[str], model: Path, data: Path, tmp_path: Path
) -> None:
    outcome = small.run(
        "train", "--model", model, "--data", data, "--adapter-path", tmp_path / "out",
        "--max-seq-length", 32, *flags,
    )  # fmt: skip
    assert outcome.code == 2
    for part in parts:
        assert part in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["accumulate", "two-pass", "per-parameter"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lion", "adafactor"])
def test_every_optimiser_learns_with_every_way_of_clipping(
    optimizer: str, mode: str, model: Path, data: Path, tmp_path: Path
) -> None:
    rates = {"sgd": 0.3, "adamw": 1e-2, "lion": 2e-3, "adafactor": 2e-2}
    train(
        model, data, tmp_path / "out", optimizer=optimizer, learning_rate=rates[optimizer],
        max_grad_norm=1.0, clip_mode=mode, iters=40, batch_size=4, lr_schedule="cosine",
        warmup_steps=4, loraplus_lr_ratio=2.0, weight_decay=0.01,
    )  # fmt: skip
    losses = [row["loss"] for row in metrics(tmp_path / "out")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--keep-blocks", 3), "--keep-blocks is 3, and the model has 2 blocks"),
        (("--keep-blocks", 2, "--num-layers", 1), "a gradient passes through 1 block only"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_blocks_that_cannot_be_kept_are_refused_before_the_data_is_read(
    flags: tuple[object, ...], told: str, more: tuple[str, ...], model: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "missing.jsonl"
    out = tmp_path / "out"
    outcome = small.run(
        "train", "--model", model, "--data", missing, "--adapter-path", out, "--max-seq-length", 32,
        *flags, *more,
    )  # fmt: skip
    assert outcome.code == 2
    assert told in outcome.err
    assert not out.exists()
