"""A run that was stopped goes on bit for bit, with the settings that its user may change."""

from __future__ import annotations

import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import small
from runs import WEIGHTS, assert_tidy, train

import lowtide as lt
from lowtide.demo.assets import asset_dir
from lowtide.errors import ConfigError, DataError, LowtideWarning, ModelError, OutputError
from lowtide.train import fingerprint
from lowtide.train.history import StepReport
from lowtide.train.observers import Quiet
from lowtide.train.resume import Resumption


class Watch(Quiet):
    """Keeps what it is told; stops the run where it is told to."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.steps: list[int] = []
        self.resumed: list[Resumption] = []

    def on_step(self, report: StepReport) -> None:
        self.steps.append(report.step)
        if report.step == self.stop_at:
            raise Stopped

    def on_resume(self, resumption: Resumption) -> None:
        self.resumed.append(resumption)


class Stopped(Exception):
    """As if the process had died here: nothing is saved any more."""


def metrics(out: Path) -> list[tuple[Any, ...]]:
    """What metrics.jsonl says, without times and memory."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "loss", "valid_loss", "n_tokens", "grad_norm", "total_tokens")
    return [tuple(line.get(key) for key in keys) for line in lines]


def stopped(model: Path, data: Path, out: Path, at: int, **given: Any) -> None:
    with pytest.raises(Stopped):
        train(model, data, out, observer=Watch(at), **given)


def same_files(one: Path, other: Path, names: tuple[str, ...]) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


RUNS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"optimizer": "sgd"},
    "momentum": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01},
    "bfloat16 state": {"optimizer_state": "bfloat16"},
    "8bit state, bfloat16 adapter": {"optimizer_state": "8bit", "adapter_dtype": "bfloat16"},
    "bfloat16 adapter": {"adapter_dtype": "bfloat16"},
    "dropout, accumulation, clipping": {
        "lora_dropout": 0.3, "grad_accumulation_steps": 2, "batch_size": 5, "max_grad_norm": 0.5,
    },
    "packing": {"packing": True, "batch_size": 5},
    "length groups, cosine, lion": {
        "group_by_length": True, "batch_size": 3, "lr_schedule": "cosine", "warmup_steps": 3,
        "optimizer": "lion",
    },
    "adafactor, two-pass clipping, LoRA+": {
        "optimizer": "adafactor", "max_grad_norm": 0.5, "clip_mode": "two-pass",
        "loraplus_lr_ratio": 4.0,
    },
    "dora, noise, dropout, one layer": {
        "use_dora": True, "neftune_noise_alpha": 5.0, "lora_dropout": 0.3, "num_layers": 1,
    },
    "mezo": {"method": "mezo", "zo_directions": 2},
    "lcsb": {"method": "lcsb", "lcsb_blocks": 1},
}  # fmt: skip


@pytest.mark.parametrize("given", RUNS.values(), ids=RUNS)
def test_a_resumed_run_ends_as_if_it_had_never_stopped(
    model: Path, data: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    # 24 records, so that 7 updates of 10 end in the third pass.
    given = {"iters": 7, "save_every": 2, "valid_data": data, "steps_per_eval": 3, **given}
    whole, out = tmp_path / "whole", tmp_path / "out"
    truth = train(model, data, whole, **given)
    stopped(model, data, out, 5, **given)  # checkpoints of 3 or 4; lines and steps of 5 are lost
    watch = Watch()
    result = train(model, data, out, observer=watch, resume=True, **given)
    assert watch.steps == [5, 6, 7]
    last = Path("checkpoints") / "step-7"
    adapters = (WEIGHTS, "adapter_config.json", f"best/{WEIGHTS}")
    assert same_files(
        whole, out, (*adapters, str(last / WEIGHTS), str(last / "optimizer.safetensors"))
    )
    assert metrics(whole) == metrics(out)
    assert (result.loss, result.valid_loss, result.n_tokens) == (
        truth.loss, truth.valid_loss, truth.n_tokens,
    )  # fmt: skip
    assert (result.best_step, result.best_valid_loss) == (truth.best_step, truth.best_valid_loss)
    assert_tidy(out, best=True)


def test_a_validation_that_was_interrupted_is_made_up_for(
    model: Path, data: Path, tmp_path: Path
) -> None:
    class Press(Quiet):
        def on_step(self, report: StepReport) -> None:
            if report.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    given = {"iters": 3, "valid_data": data, "steps_per_eval": 3}
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(model, data, whole, **given)
    assert train(model, data, out, observer=Press(), **given).interrupted
    assert len(metrics(out)) == 4
    result = lt.train(adapter_path=out, resume=True)
    assert (result.steps, result.best_step) == (3, 3)
    assert metrics(whole) == metrics(out)
    assert same_files(whole, out, (WEIGHTS, f"best/{WEIGHTS}"))


def test_the_directory_alone_says_all_that_a_resumed_run_needs(
    model: Path, data: Path, tmp_path: Path
) -> None:
    given = {"iters": 6, "save_every": 2, "seed": 3, "lora_r": 3}
    train(model, data, tmp_path / "whole", **given)
    out = tmp_path / "out"
    stopped(model, data, out, 4, **given, sample_prompt=["a number"], sample_tokens=2)
    outcome = small.run("train", "--resume", "--adapter-path", out)
    assert outcome.code == 0, outcome.err
    assert f"resumed  {out}/checkpoints/step-2" in outcome.out
    assert "changed" not in outcome.out
    assert same_files(tmp_path / "whole", out, (WEIGHTS, "adapter_config.json"))
    assert "resume: false" in (out / "run.yaml").read_text()


def test_a_finished_run_goes_on_with_more_updates(model: Path, data: Path, tmp_path: Path) -> None:
    train(model, data, tmp_path / "whole", iters=6)
    out = tmp_path / "out"
    train(model, data, out, iters=4)
    before = small.tree(out)
    outcome = small.run("train", "--resume", "--adapter-path", out, "--json")
    assert outcome.code == 0
    assert outcome.document["steps"] == 4
    assert "all 4 updates are made; --iters or --epochs goes on" in outcome.err
    assert {n: held for n, held in small.tree(out).items() if n != "events.jsonl"} == {
        n: held for n, held in before.items() if n != "events.jsonl"
    }
    outcome = small.run("train", "--resume", "--adapter-path", out, "--iters", 6)
    assert "changed  iters: was 4, now 6" in outcome.out
    assert "step 5/6" in outcome.out
    assert same_files(tmp_path / "whole", out, (WEIGHTS,))
    assert metrics(tmp_path / "whole") == metrics(out)
    with pytest.raises(ConfigError, match=r"would end after 5 updates, and has made 6"):
        lt.train(adapter_path=out, resume=True, iters=5)


def test_a_setting_that_may_change_wins_when_it_is_given(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(model, data, out, optimizer="sgd", lora_dropout=0.2)
    watch = Watch()
    lt.train(adapter_path=out, resume=True, observer=watch, iters=5, learning_rate=0.5)
    (resumption,) = watch.resumed
    assert resumption.changes == ("learning_rate: was 0.01, now 0.5", "iters: was 4, now 5")
    saved = (out / "run.yaml").read_text()
    assert "learning_rate: 0.5" in saved
    assert "lora_dropout: 0.2" in saved
    watch = Watch()
    lt.train(adapter_path=out, resume=True, observer=watch, iters=6)  # 0.5 is now what it was
    assert watch.resumed[0].changes == ("iters: was 5, now 6",)


def test_settings_that_would_make_another_run_are_refused_together(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(model, data, out)
    before = small.tree(out)
    outcome = small.run(
        "train", "--resume", "--adapter-path", out, "--lora-r", 4, "--seed", 9, "--method", "mezo",
        "--batch-size", 1, "--iters", 9,
    )  # fmt: skip
    assert outcome.code == 2
    assert "--lora-r 4: the run has 8" in outcome.err
    assert "--seed 9: the run has 0" in outcome.err
    assert "--method mezo: the run has mesp" in outcome.err
    assert "--batch-size" not in outcome.err
    assert "Leave them out, or start a new run in another --adapter-path" in outcome.err
    assert small.tree(out) == before


def test_another_model_or_other_data_is_refused_unless_told_otherwise(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(model, data, out, valid_data=data)
    other = small.write_small_model(tmp_path / "other", rms_norm_eps=1e-6)
    rows = [{"text": sentence} for sentence in small.SENTENCES[::-1]]
    changed = small.write_jsonl(tmp_path / "changed.jsonl", rows)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"model": other}, ModelError, f"the model in {other} is not that of the run in {out}"),
        ({"data": changed}, DataError, f"the training data in {changed} is not that of the run"),
        ({"valid_data": changed}, DataError, f"the validation data in {changed} is not that"),
    ]
    before = small.tree(out)
    for given, kind, text in cases:
        with pytest.raises(kind) as error:
            lt.train(adapter_path=out, resume=True, iters=5, **given)
        assert text in str(error.value)
        assert "--resume-anyway" in str(error.value)
        assert small.tree(out) == before
    lt.train(adapter_path=out, resume=True, iters=5, resume_anyway=True, data=changed, model=other)
    moved = changed.rename(tmp_path / "moved.jsonl")
    watch = Watch()
    lt.train(adapter_path=out, resume=True, iters=6, data=moved, observer=watch)
    assert f"data: was {changed}, now {moved}" in watch.resumed[0].changes


def test_weights_that_were_trained_further_are_another_model(model: Path, tmp_path: Path) -> None:
    decoder = lt.load_model(model)
    print_of = fingerprint.model_fingerprint(decoder)
    assert fingerprint.model_fingerprint(lt.load_model(model)) == print_of
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    other = tmp_path / "other"
    small.write_small_model(other)
    assert fingerprint.model_fingerprint(lt.load_model(other)) == print_of
    content[-1000] ^= 1
    (other / "model.safetensors").write_bytes(content)
    assert fingerprint.model_fingerprint(lt.load_model(other)) != print_of


def test_another_version_or_other_arithmetic_is_told(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    train(model, data, out)
    monkeypatch.setattr(lt, "__version__", "0.9.9")
    with pytest.raises(OutputError, match=r"by lowtide 0\.1\.0; this is 0\.9\.9.*--resume-anyway"):
        lt.train(adapter_path=out, resume=True, iters=5)
    now = fingerprint.arithmetic("full")
    monkeypatch.setattr(fingerprint.torch, "__version__", "9.0.0")
    with pytest.warns(LowtideWarning) as told:
        lt.train(adapter_path=out, resume=True, iters=5, resume_anyway=True)
    expected = f"not bit for bit as it would have: torch {now['torch']} then, 9.0.0 now."
    assert any(expected in str(one.message) for one in told)


def test_a_checkpoint_of_a_newer_version_is_refused(
    model: Path, data: Path, tmp_path: Path
) -> None:
    from lowtide.train import checkpoints

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT", 7)
        patch.setattr(lt, "__version__", "3.2.1")
        train(model, data, out)
    before = small.tree(out)
    outcome = small.run("train", "--resume", "--adapter-path", out, "--resume-anyway")
    assert outcome.code == 2
    assert "was written by lowtide 3.2.1, in format 7; this is lowtide 0.1.0" in outcome.err
    assert "Resume with lowtide 3.2.1 or newer" in outcome.err
    assert small.tree(out) == before


def test_nothing_to_resume_is_said(model: Path, data: Path, tmp_path: Path) -> None:
    outcome = small.run("train", "--resume")
    assert outcome.code == 2
    assert "--resume needs --adapter-path" in outcome.err
    (tmp_path / "empty").mkdir()
    for name, found in (("empty", "holds no checkpoint"), ("none", "is not a directory")):
        outcome = small.run("train", "--resume", "--adapter-path", tmp_path / name)
        assert outcome.code == 2
        assert f"{tmp_path / name} {found}, so there is nothing to go on with" in outcome.err
        assert "Start the run without --resume" in outcome.err
    assert not (tmp_path / "none").exists()
    outcome = small.run(
        "train", "--resume", "--overwrite", "--adapter-path", tmp_path / "empty", "--model", model,
        "--data", data,
    )  # fmt: skip
    assert outcome.code == 2


def test_a_resumed_run_and_a_replaced_one_exclude_each_other(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(model, data, out)
    outcome = small.run("train", "--resume", "--overwrite", "--adapter-path", out)
    assert outcome.code == 2
    assert "--resume goes on with a run, --overwrite replaces it; give one of them" in outcome.err


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "no state", "state"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_used(
    model: Path, data: Path, tmp_path: Path, damage: str
) -> None:
    given = {"iters": 6, "save_every": 2}
    train(model, data, tmp_path / "whole", **given)
    out = tmp_path / "out"
    stopped(model, data, out, 5, **given)
    newest = out / "checkpoints" / "step-4"
    name = {"flip": "optimizer.safetensors", "state": "state.json"}.get(damage, WEIGHTS)
    content = bytearray((newest / name).read_bytes())
    content[-20] ^= 1
    if damage == "cut":
        del content[-1:]
    (newest / name).unlink()  # its second name is that of the adapter in place
    if damage in ("flip", "cut", "state"):
        (newest / name).write_bytes(content)
    if damage == "no state":
        (newest / "state.json").unlink()
    outcome = small.run("train", "--resume", "--adapter-path", out)
    assert outcome.code == 0, outcome.err
    told = {
        "flip": "optimizer.safetensors does not have its checksum",
        "cut": f"{WEIGHTS} has {len(content):,} bytes instead of {len(content) + 1:,}",
        "missing": f"{WEIGHTS} is missing",
        "no state": "state.json is missing",
        "state": "state.json",
    }[damage]
    assert "damaged  step-4: " in outcome.out
    assert told in outcome.out
    assert f"resumed  {out}/checkpoints/step-2" in outcome.out
    assert same_files(tmp_path / "whole", out, (WEIGHTS,))
    assert metrics(tmp_path / "whole") == metrics(out)
    assert_tidy(out)


def test_no_checkpoint_that_can_be_used_is_an_error(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(model, data, out, save_every=2)
    for checkpoint in (out / "checkpoints").iterdir():
        (checkpoint / "state.json").write_text("{}")
    before = small.tree(out)
    outcome = small.run("train", "--resume", "--adapter-path", out)
    assert outcome.code == 2
    assert f"no checkpoint in {out} can be used" in outcome.err
    assert "step-4: state.json is not whole" in outcome.err
    assert "Start again with --overwrite" in outcome.err
    assert small.tree(out) == before


def test_a_checkpoint_is_due_after_minutes_too(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The monotonic clock goes 25 s with each update; the wall clock runs backwards.
    from lowtide.train import loop

    saved: list[int] = []

    class Clock(Quiet):
        now = 0.0

        def on_step(self, report: StepReport) -> None:
            self.now += 25.0

        def on_save(self, step: int) -> None:
            saved.append(step)

    clock = Clock()
    monkeypatch.setattr(loop, "monotonic", lambda: clock.now)
    monkeypatch.setattr("time.time", iter(range(10**6, 0, -1)).__next__)
    train(model, data, tmp_path / "out", observer=clock, iters=9, save_minutes=1, save_every=7)
    assert saved == [3, 6, 7, 9]  # 7 is due by number, and from then on the minute counts anew


def test_kept_checkpoints_are_the_newest(model: Path, data: Path, tmp_path: Path) -> None:
    train(model, data, tmp_path / "out", save_every=1, iters=6, keep_checkpoints=3)
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == ["step-4", "step-5", "step-6"]


def test_the_best_adapter_is_kept_apart(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Something else than what is trained on, which gets worse while that is learnt by heart.
    valid = small.write_jsonl(tmp_path / "valid.jsonl", [{"text": "THEY SAY: 7 7 number."}])
    result = train(
        model, data, out, iters=12, valid_data=valid, steps_per_eval=1, learning_rate=0.05,
        save_every=100,
    )  # fmt: skip
    lines = [line for line in metrics(out) if line[2] is not None]
    best = min(lines, key=lambda line: line[2])
    assert result.best_step == best[0] not in (0, 12)
    assert result.best_valid_loss == best[2]
    outcome = small.run(
        "eval", "--model", model, "--data", valid, "--adapter-path", out / "best", "--json",
        "--max-seq-length", 32,
    )  # fmt: skip
    assert outcome.document["loss"] == pytest.approx(best[2], rel=1e-6)


def test_two_threads_give_the_same_bytes_twice_and_across_a_resume(tmp_path: Path) -> None:
    """On a model whose products are large enough to be shared by threads."""
    rows = [{"text": sentence} for sentence in small.SENTENCES]
    data = small.write_jsonl(tmp_path / "rows.jsonl", rows)
    given = [
        "train", "--model", asset_dir(), "--data", data, "--threads", 2, "--batch-size", 4,
        "--max-seq-length", 64, "--lora-dropout", 0.1,
    ]  # fmt: skip
    for name, iters in (("one", 4), ("two", 4), ("out", 2)):
        done = small.run_process(*given, "--adapter-path", tmp_path / name, "--iters", iters)
        assert done.code == 0, done.err
    resumed = ["train", "--resume", "--adapter-path", tmp_path / "out", "--iters", 4]
    done = small.run_process(*resumed)
    assert done.code == 0, done.err
    assert done.err == ""
    assert same_files(tmp_path / "one", tmp_path / "two", (WEIGHTS,))
    assert same_files(tmp_path / "one", tmp_path / "out", (WEIGHTS,))


def test_nothing_draws_from_generators_that_no_checkpoint_holds(
    model: Path, data: Path, tmp_path: Path
) -> None:
    import random

    import numpy as np
    import torch

    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = states()
    train(model, data, tmp_path / "out", lora_dropout=0.5, optimizer_state="8bit", valid_data=data)
    train(model, data, tmp_path / "mezo", method="mezo")
    assert states() == before


def test_resuming_needs_no_warnings(model: Path, data: Path, tmp_path: Path) -> None:
    train(model, data, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lt.train(adapter_path=tmp_path / "out", resume=True, iters=5)
