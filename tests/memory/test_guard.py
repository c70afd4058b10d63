"""A budget is watched before anything is allocated; lossy state is counted and never chosen."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from safetensors.torch import load_file

import lowtide as lt
from lowtide.bench.child import flags_of
from lowtide.cli.main import main
from lowtide.config import build
from lowtide.errors import BudgetError, ConfigError, TrainingError
from lowtide.memory.choice import candidates, choose, lossy
from lowtide.memory.plan import Workload, predict
from lowtide.methods import MethodOptions, get_method
from lowtide.model.adapter import LoraConfig
from lowtide.model.families import spec_from_config
from lowtide.train import budget
from lowtide.train.budget import within_budget
from lowtide.train.loop import Trainer
from lowtide.train.run import Quiet
from lowtide.train.settings import TrainSettings
from lowtide.weights.storages import STORAGES

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "max_position_embeddings": 1024,
}
WORK = Workload(
    spec=spec_from_config({**small.CONFIG, **SHAPE}),
    config=LoraConfig(64),
    method="mesp",
    optimizer="adamw",
    momentum=False,
    accumulates=False,
    lengths=(64,),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_small_model(tmp_path_factory.mktemp("model") / "m", **SHAPE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"text": sentence} for sentence in small.SENTENCES]
    return small.write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


def test_what_a_lossy_setting_saves_is_told_and_it_is_never_taken(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["plan", "--model", str(model), "--lora-r", "64", "--max-seq-length", "64"]
    assert main([*flags, "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["settings"]["optimizer_state"] == "float32"
    assert [one["setting"] for one in told["lossy"]] == [
        "--optimizer-state bfloat16", "--optimizer-state 8bit"
    ]  # fmt: skip
    for one in told["lossy"]:
        assert f"{one['setting']} takes {one['saves_bytes'] / 1e6:.1f} MB less" in err
        assert main([*flags, *one["setting"].split(), "--json"]) == 0
        other = json.loads(capsys.readouterr().out)
        saved = told["predicted_peak_bytes"] - other["predicted_peak_bytes"]
        assert saved == one["saves_bytes"] > 0
    assert "applied in the backward" in err
    assert main([*flags, "--accumulate", "--json"]) == 0
    summed = json.loads(capsys.readouterr().out)
    more = summed["predicted_peak_bytes"] - told["predicted_peak_bytes"]
    assert more == told["accumulated_bytes"]
    assert main([*flags, "--optimizer=sgd", "--optimizer-state=8bit"]) == 2
    assert "sgd without it keeps no state" in capsys.readouterr().err


def test_too_small_a_budget_names_what_lossy_settings_would_do() -> None:
    least = min(plan.needed_bytes for plan in candidates(WORK, MethodOptions()))
    with pytest.raises(ConfigError) as caught:
        choose(WORK, MethodOptions(), least - 1)
    text = str(caught.value)
    for state in ("bfloat16", "8bit"):
        named = float(text.split(f"--optimizer-state {state} to ")[1].split(" MB")[0])
        other = replace(WORK, state=state)
        assert choose(other, MethodOptions(), round(named * 1e6))
        with pytest.raises(ConfigError):
            choose(other, MethodOptions(), round(named * 1e6) - 100_000)
    assert not lossy(replace(WORK, optimizer="sgd"))
    with pytest.raises(ConfigError) as caught:
        choose(replace(WORK, optimizer="sgd"), MethodOptions(), 1_000_000)
    assert "ossy" not in str(caught.value)


@pytest.mark.parametrize("storage", STORAGES)
def test_unpacking_is_planned(storage: str) -> None:
    plain = predict(WORK, MethodOptions()).predicted_peak_bytes
    quantised = predict(replace(WORK, storages=(storage,)), MethodOptions()).predicted_peak_bytes
    tile = 2 * 512 * 512  # elements: 512 rows for each of gate and up
    assert 0 < quantised - plain <= tile


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"optimizer_state": "8bit"},
        {"optimizer_state": "8bit", "adapter_dtype": "bfloat16"},
        {"optimizer": "sgd", "momentum": 0.9, "optimizer_state": "bfloat16"},
        {"optimizer": "lion"},
        {"optimizer": "lion", "optimizer_state": "8bit"},
        {"optimizer": "adafactor"},
    ],
)
def test_state_takes_what_is_planned(model: Path, given: dict[str, Any]) -> None:
    """5% or 4 MB, which is less than what each of the settings saves."""
    settings = {"optimizer": "adamw", "lora_r": 64, **given}
    plan = lt.plan(model=str(model), max_seq_length=64, **settings)
    done = subprocess.run(
        [
            sys.executable, "-m", "lowtide.cli.main", "bench", "step", "--model", str(model),
            "--steps", "2", "--seq-len", "64", "--json", *flags_of(settings),
        ],
        capture_output=True, text=True, env=small.environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    measured = max(step["peak_anon_bytes"] for step in found["steps"])
    predicted = plan.predicted_peak_bytes
    assert abs(predicted - measured) <= max(0.05 * measured, 4e6), plan.by_kind
    for name, value in given.items():
        assert found.get(name, value) == value


class Never:
    """A method that nothing may ask anything of."""

    name, exact = "never", True

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was called")


def trainer(model: Path, tokens: int, **given: Any) -> Trainer:
    """One with a budget that just allows batches of one sequence of so many tokens."""
    values = {"model": str(model), "data": "-", "adapter_path": "-", "lora_r": 4, **given}
    settings = build(TrainSettings, values)
    decoder = lt.load_model(model)
    work = budget.workload(settings, decoder, (tokens,), False)
    least = predict(work, MethodOptions()).needed_bytes
    limited = replace(settings, memory_budget=str(least))
    fitting, guard = within_budget(limited, decoder, (tokens,))
    assert guard is not None
    adapter = lt.Adapter.create(decoder, settings.lora_config(decoder.spec), 0)
    return Trainer(decoder, adapter, get_method("mesp", fitting), settings, guard)


def test_a_batch_above_the_budget_is_refused_before_anything_is_done(model: Path) -> None:
    run = trainer(model, 64)
    method, run.method = run.method, Never()  # type: ignore[assignment]  # which is the point
    long = lt.Batch.from_sequences([list(range(80))])
    many = lt.Batch.from_sequences([list(range(40))] * 2)
    small_one = lt.Batch.from_sequences([list(range(64))])
    before = {name: p.clone() for name, p in run.adapter.items()}
    with pytest.raises(BudgetError, match=r"a batch of 80 tokens, the longest sequence 80, needs"):
        run.update([small_one, long], 1)
    with pytest.raises(BudgetError, match=r"a batch of 80 tokens, the longest sequence 40, needs"):
        run.update([many], 1)
    with pytest.raises(BudgetError, match=r"the budget is .* Raise --memory-budget, or lower"):
        run.reserve([400])
    assert all(torch.equal(p, before[name]) for name, p in run.adapter.items())
    run.method = method
    run.reserve([64])
    run.update([small_one], 1)
    assert not all(torch.equal(p, before[name]) for name, p in run.adapter.items())


def test_memory_that_others_took_is_not_asked_for(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(model, 64)
    needed = predict(
        budget.workload(run.settings, run.model, (64,), False), MethodOptions()
    ).needed_bytes
    at_import = budget.measure.AT_IMPORT
    held = 2_000_000
    now = replace(at_import, anon_bytes=at_import.anon_bytes + held)
    monkeypatch.setattr(budget, "read_memory", lambda: now)
    monkeypatch.setattr(budget, "available_bytes", lambda: needed - held - 1)
    method, run.method = run.method, Never()  # type: ignore[assignment]  # which is the point
    with pytest.raises(BudgetError, match=r"2\.0 MB are held already, and .* MB are free now"):
        run.reserve([64])
    run.method = method
    monkeypatch.setattr(budget, "available_bytes", lambda: needed - held)
    run.reserve([64])


def test_a_run_that_is_refused_keeps_its_last_adapter(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs short between the third update and the fourth; the third was saved."""
    updates: list[int] = []
    at_import = budget.measure.AT_IMPORT
    monkeypatch.setattr(budget, "read_memory", lambda: at_import)
    monkeypatch.setattr(budget, "available_bytes", lambda: 10**10 if len(updates) < 3 else 10**6)
    adapters = []

    class Observer(Quiet):
        def on_step(self, report: Any) -> None:
            updates.append(report.step)

        def on_save(self, step: int) -> None:
            saved = tmp_path / "out" / "checkpoints" / f"step-{step}"
            adapters.append(load_file(saved / "adapter_model.safetensors"))

    with pytest.raises(TrainingError) as caught:
        lt.train(
            model=str(model), data=str(data), adapter_path=str(tmp_path / "out"), iters=9,
            max_seq_length=32, save_every=1, memory_budget="1GB", observer=Observer(),
        )  # fmt: skip
    text = str(caught.value)
    assert "training stopped at step 4" in text
    assert "MB are free now. Close other programs" in text
    assert "is that of step 2. Go on from step 3 with --resume." in text
    assert len(adapters) == 3
    places = {1: tmp_path / "out", 2: tmp_path / "out" / "checkpoints" / "step-3"}
    for number, place in places.items():
        kept = load_file(place / "adapter_model.safetensors")
        assert all(torch.equal(kept[name], t) for name, t in adapters[number].items())
    assert not all(torch.equal(adapters[1][name], t) for name, t in adapters[2].items())


def test_bench_step_is_refused_when_memory_runs_short(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_import, asked = budget.measure.AT_IMPORT, iter([10**10, 10**10])
    monkeypatch.setattr(budget, "read_memory", lambda: at_import)
    monkeypatch.setattr(budget, "available_bytes", lambda: next(asked, 1000))
    flags = ["bench", "step", "--model", str(model), "--memory-budget", "1GB", "--seq-len", "32"]
    assert main(flags) == 1
    assert "MB are free now" in capsys.readouterr().err
