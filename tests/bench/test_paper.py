"""The paper's cases, and the commands that run them."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import small

from lowtide.bench import paper, peer_child
from lowtide.bench.case import Case
from lowtide.bench.child import SkippedError, flags_of, run_child
from lowtide.bench.convergence import curves, run_convergence
from lowtide.bench.paper import MODELS, PaperSettings, paper_cases
from lowtide.bench.peers import peer_cases, run_peer
from lowtide.bench.predict import needed_bytes
from lowtide.bench.quality_case import QualitySettings
from lowtide.bench.results import GROUPS, label
from lowtide.bench.step import BenchStepSettings
from lowtide.config import build, given_values, parser_for
from lowtide.errors import ConfigError
from lowtide.methods import check_options
from lowtide.train.settings import TrainSettings


def planned(**given: Any) -> list[Case]:
    return paper_cases(build(PaperSettings, {"out": "results", **given}))


def test_the_full_run_holds_the_papers_tables() -> None:
    cases = planned()
    assert len({case.name for case in cases}) == len(cases)
    count = Counter(case.group for case in cases)
    assert set(count) == set(GROUPS)
    assert (count["models"], count["sequence"], count["rank"]) == (12, 16, 8)
    assert (count["store_h"], count["convergence"], count["timeline"]) == (6, 3, 4)
    by_group = {group: [c.settings for c in cases if c.group == group] for group in GROUPS}
    assert {s["seq_len"] for s in by_group["sequence"]} == {128, 256, 512, 1024}
    assert {s["lora_r"] for s in by_group["rank"]} == {4, 8, 16, 32}
    assert {label(s) for s in by_group["models"]} == {"mesp", "mebp sweep", "mebp full", "mezo"}
    assert {s["seq_len"] for s in by_group["models"]} == {256}
    assert ("qwen2.5-3b", "mesp store-h") in {(s["shape"], label(s)) for s in by_group["store_h"]}
    order = list(MODELS.values())
    sizes = [order.index(case.settings["shape"] or order[0]) for case in cases]
    assert sizes == sorted(sizes)  # what takes hours comes last


@pytest.mark.parametrize("quick", [False, True])
def test_every_case_is_a_command_that_is_understood(quick: bool) -> None:
    kinds = {"step": BenchStepSettings, "timeline": BenchStepSettings}
    kinds |= {"quality": QualitySettings, "convergence": TrainSettings}
    for case in planned(quick=quick):
        assert needed_bytes(case.kind, case.settings) > 10**8
        if case.kind == "peer":
            continue
        given = {**case.settings}
        if case.kind == "convergence":
            given["adapter_path"] = "somewhere"
        kind = kinds[case.kind]
        parsed = parser_for(kind, "test", "test").parse_strictly(flags_of(given))
        settings = build(kind, given_values(parsed))
        if case.kind in ("step", "timeline"):
            check_options(settings.method, settings)


def test_the_quick_run_is_small() -> None:
    cases = planned(quick=True)
    assert {case.settings["shape"] for case in cases} == {"smollm2-135m", None}
    assert {case.group for case in cases} == set(GROUPS)
    assert all(case.settings.get("steps", 1) == 1 for case in cases)


def test_models_and_groups_are_chosen() -> None:
    assert {case.group for case in planned(models="3b,1.5b")} == {"models", "store_h"}
    (first, *_) = planned(models="3b", only="rank", steps=7)
    assert (first.group, first.settings["shape"], first.settings["steps"]) == (
        "rank", "qwen2.5-3b", 7,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"models": "0.5b,7b"}, "--models: there is no '7b'.* Choose from 0.5b, 1.5b, 3b"),
        ({"models": ","}, "--models is empty"),
        ({"only": "sequnce"}, "'sequnce'; did you mean 'sequence'"),
        ({"quick": True, "models": "3b"}, "--quick measures smollm2-135m"),
    ],
)
def test_what_is_not_there_is_refused_with_the_list(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(**given)


def test_a_failed_case_makes_exit_code_1_and_is_retried(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"shape": None, "model": str(model), "method": "mesp", "steps": 1}
    cases = [
        Case("too-long", "models", "step", {**own, "seq_len": 10 * small.POSITIONS}),
        Case("good", "models", "step", {**own, "seq_len": 8}),
    ]
    monkeypatch.setattr(paper, "paper_cases", lambda settings: cases)
    first = small.run("bench", "paper", "--out", tmp_path, "--json")
    assert first.code == 1
    assert (first.document["done"], first.document["failed"]) == (["good"], ["too-long"])
    assert "failed: " in first.err
    assert "64 positions" in first.err
    second = small.run("bench", "paper", "--out", tmp_path, "--json")
    assert (second.code, second.document["kept"]) == (1, ["good"])
    cases.pop(0)
    assert small.run("bench", "paper", "--out", tmp_path).code == 0


def test_the_quality_of_estimates(model: Path) -> None:
    base = ("bench", "quality", "--model", model, "--seq-len", 8)
    done = small.run(*base, "--directions", "1,3", "--json")
    assert done.code == 0, done.err
    result = done.document
    assert result["directions"] == [1, 3]
    assert set(result["overall"]["3"]) == {"cosine", "expected"}
    assert all(set(layer["cosine"]) == {"1", "3"} for layer in result["layers"])
    # B is not zero: A's gradient is there, so a cosine differs from B's alone; and it is no zero.
    assert all(layer["cosine"]["1"] != 0 for layer in result["layers"])
    wrong = small.run(*base, "--directions", "1,few")
    assert wrong.code == 2
    assert "directions = '1,few': expected whole numbers" in wrong.err


def test_convergence_reads_what_training_logged(tmp_path: Path) -> None:
    (case,) = [c for c in planned(quick=True) if c.name == "convergence-demo-mesp"]
    settings = {**case.settings, "iters": 3, "steps_per_eval": 2, "val_batches": 1}
    result = run_convergence(settings, tmp_path)
    assert [point["step"] for point in result["curve"]] == [1, 2, 3]
    assert [point["step"] for point in result["valid"]] == [0, 2, 3]
    walls = [point["wall_s"] for point in result["curve"]]
    assert 0 < walls[0] < walls[1] < walls[2]
    assert (result["method"], result["data"]) == ("mesp", "household")


def test_curves_add_up_the_time_of_steps() -> None:
    step = {"loss": 2.0, "n_tokens": 5, "wall_s": 0.5, "cpu_s": 1.0}
    curve, valid = curves(
        [{"step": 0, "valid_loss": 3.0}, {"step": 1, **step}, {"step": 2, **step},
         {"step": 2, "valid_loss": 1.0, "n_tokens": 9}]
    )  # fmt: skip
    assert curve[-1] == {"step": 2, "loss": 2.0, "n_tokens": 5, "wall_s": 1.0}
    assert valid == [
        {"step": 0, "loss": 3.0, "wall_s": 0.0},
        {"step": 2, "loss": 1.0, "wall_s": 1.0},
    ]


def test_peers_name_their_ways() -> None:
    cases = peer_cases("qwen2.5-0.5b", 256, 3)
    ways = [(case.settings["peer"], case.settings["checkpointing"]) for case in cases]
    assert ways == [
        ("trl+peft", True), ("trl+peft", False), ("trl+peft+patch", True), ("mlx-lm", True)
    ]  # fmt: skip
    assert len({case.name for case in cases}) == 4


def test_a_peer_that_is_not_installed_is_skipped_by_name(tmp_path: Path, model: Path) -> None:
    code = f"""
import importlib.util, json, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name.startswith("mlx") else find(name)
from lowtide.bench.peer_child import main
sys.exit(main([json.dumps({{"peer": "mlx-lm", "model": {str(model)!r}}})]))
"""
    with pytest.raises(SkippedError, match=r"^mlx-lm is not installed \(missing: mlx, mlx_lm\)"):
        run_child([sys.executable, "-c", code], tmp_path)


def test_missing_parts_of_a_peer_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_child.importlib.util, "find_spec", lambda name: name == "peft" or None)
    with pytest.raises(SkippedError, match=r"missing: trl, transformers, datasets\).*\[bench\]"):
        peer_child.measured({"peer": "trl+peft"})


@pytest.mark.slow
def test_trl_is_measured(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("trl")
    case = peer_cases(str(model), 16, 2)[0]
    result = run_peer(case.settings, tmp_path)
    assert (result["peer"], len(result["steps"])) == ("trl+peft", 2)
    assert 0 < result["peak_anon_bytes"] < result["peak_anon_above_import_bytes"]
    own = small.run(
        "bench", "step", "--model", model, "--seq-len", 16, "--steps", 1, "--json"
    ).document
    assert result["n_adapter_parameters"] == own["n_adapter_parameters"]


def test_the_help_lists_every_bench() -> None:
    done = small.run("bench", "--help")
    assert done.code == 0
    for name in ("step", "timeline", "quality", "paper", "peers", "compare", "report"):
        assert f"\n  {name} " in done.out
        assert small.run("bench", name, "--help").out.startswith(f"usage: lowtide bench {name}")


@pytest.mark.parametrize("name", ["timeline", "quality", "paper", "peers", "compare", "report"])
def test_what_is_required_is_said(name: str) -> None:
    done = small.run("bench", name)
    assert done.code == 2
    assert "is required" in done.err
