"""Predicted memory against measured, budgets kept and refused, and what `lowtide plan` says."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small import CONFIG, environment, small_weights, write_small_model

import lowtide as lt
from lowtide.bench.child import flags_of
from lowtide.cli.main import main
from lowtide.errors import ConfigError
from lowtide.memory.choice import candidates, choose
from lowtide.memory.plan import PLANNED, Plan, Workload, predict
from lowtide.methods import get_method
from lowtide.methods.options import MethodOptions
from lowtide.model.adapter import Adapter, LoraConfig
from lowtide.model.families import spec_from_config
from lowtide.ops.products import KERNEL_BYTES, goes_to_onednn, products_as, scratch_bytes

RANDOM_CASES = 60
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "max_position_embeddings": 4096,
}
WORK = Workload(
    spec=spec_from_config({**CONFIG, **SHAPE}),
    config=LoraConfig(8),
    method="mesp",
    optimizer="sgd",
    momentum=False,
    accumulates=False,
    lengths=(512,),
)


def _bounds(measured: int) -> float:
    """What a prediction may be wrong by: 5% or 4 MB."""
    return max(0.05 * measured, 4e6)


def _draw(rng: random.Random) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A shape, what is to be done, and options."""
    heads = rng.choice([4, 8, 14, 16])
    hidden = rng.choice([256, 512, 896, 1536, 2048])
    shape = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": rng.choice([2, 3, 5]) * hidden + rng.choice([0, 64, 128]),
        "num_hidden_layers": rng.choice([2, 3, 6]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([k for k in (1, 2, 4, 7, 8) if heads % k == 0]),
        "head_dim": rng.choice([64, 128]),
        "vocab_size": rng.choice([2000, 8192, 32000]),
        "max_position_embeddings": 4096,
    }
    method = rng.choice(["mesp", "mesp", "mesp", "mezo", "lcsb"])
    do = {
        "method": method,
        "seq_len": rng.choice([16, 64, 128, 200, 256, 512, 777]),
        "batch_size": rng.choice([1, 1, 1, 2, 3]),
        "lora_r": rng.choice([1, 4, 8, 16, 32, 64]),
        "lora_dropout": rng.choice([0.0, 0.0, 0.1]),
        "target_modules": rng.choice(["all-linear", "all-linear", "q_proj,v_proj"]),
        "optimizer": rng.choice(["sgd", "adamw"]),
        "dtype": rng.choice([torch.bfloat16, torch.bfloat16, torch.float32]),
    }
    options: dict[str, Any] = {"tiles": rng.choice(["full", "full", "half", "quarter"])}
    if method == "mesp":
        options["keep_blocks"] = rng.choice([0, 0, rng.randint(0, shape["num_hidden_layers"])])
        options["block_inputs"] = rng.choice(["memory", "file"])
        options["recompute_h"] = rng.random() < 0.8
    return shape, do, options


def _write(directory: Path, shape: dict[str, Any], dtype: torch.dtype) -> Path:
    config = {**CONFIG, **shape}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    weights = {name: w.to(dtype) for name, w in small_weights(config).items()}
    save_file(weights, directory / "model.safetensors")
    return directory


def _measured(model: Path, settings: dict[str, Any]) -> int:
    """The highest peak of two steps in a fresh process."""
    done = subprocess.run(
        [
            sys.executable, "-m", "lowtide.cli.main", "bench", "step", "--model", str(model),
            "--steps", "2", "--json", *flags_of(settings),
        ],
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return max(step["peak_anon_bytes"] for step in json.loads(done.stdout)["steps"])


def _case(seed: int, directory: Path) -> tuple[Plan, int]:
    shape, do, options = _draw(random.Random(seed))
    dtype = do.pop("dtype")
    model = _write(directory, shape, dtype)
    work = Workload(
        spec=spec_from_config({**CONFIG, **shape}),
        config=LoraConfig(
            do["lora_r"], lora_dropout=do["lora_dropout"], target_modules=do["target_modules"]
        ),
        method=do["method"],
        optimizer=do["optimizer"],
        momentum=False,
        accumulates=False,
        lengths=(do["seq_len"],) * do["batch_size"],
        widened=dtype != torch.float32,
    )
    return predict(work, MethodOptions(**options)), _measured(model, {**do, **options})


@pytest.mark.parametrize("seed", range(3))
def test_the_prediction_is_near_what_is_measured(seed: int, tmp_path: Path) -> None:
    plan, measured = _case(seed, tmp_path / "model")
    assert abs(plan.predicted_peak_bytes - measured) <= _bounds(measured), plan.by_kind


@pytest.mark.parametrize("products", ["auto", "torch"])
@pytest.mark.parametrize(
    ("method", "keep_blocks", "dora"),
    [("mezo", 0, False), ("mezo", 0, True), ("mesp", 0, False), ("mesp", 2, False)],
)
def test_what_is_planned_as_untouched_keeps_a_mark(
    method: str, keep_blocks: int, dora: bool, products: str, tmp_path: Path
) -> None:
    """Whole tiles and activations of 16-bit weights too, of which a step may use every second."""
    tokens, mark = 80, 1.2345e30
    shape = {**SHAPE, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}
    model = lt.load_model(_write(tmp_path / "model", shape, torch.bfloat16))
    adapter = Adapter.create(model, LoraConfig(4, use_dora=dora), 0)
    batch = lt.Batch.from_sequences([[i % 7 for i in range(tokens)]])
    with products_as(products):
        options = MethodOptions(products=products)
        if keep_blocks:
            options = replace(options, keep_blocks=keep_blocks)
        chosen = get_method(method, options)
        chosen.reserve(model, tokens, tokens)
        ws = chosen._buffers._ws  # type: ignore[attr-defined]
        whole = [*ws._wide, *ws._narrow, *ws.tile.chunk(2), *ws.glu.activations, *ws.scores]
        for part in whole:
            part.fill_(mark)
        lt.gradients(model, adapter, batch, method=chosen)
        planned = ws.untouched_bytes(
            backward=method != "mezo", widened=True, recomputes=keep_blocks < 2, apart=dora
        )
        exact = goes_to_onednn() and not dora
    marked = [int((part == mark).sum()) for part in whole]
    # Tiles, activations and scores that are used need not be filled; wide[4] may be in part.
    idle = sum(n for n, part in zip(marked, whole, strict=True) if n == part.numel())
    in_part = marked[4] if marked[4] < whole[4].numel() else 0
    assert idle + in_part >= planned // 4, marked
    assert idle + in_part == planned // 4 or not exact, marked


_ONE_STEP = """
import sys, torch, lowtide as lt
from lowtide.methods import get_method
from lowtide.methods.options import MethodOptions
path, method, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = lt.load_model(path)
adapter = lt.Adapter.create(model, lt.LoraConfig(4), seed=0)
batch = lt.Batch.from_sequences([torch.randint(0, 2000, (tokens,)).tolist()])
lt.gradients(model, adapter, batch, method=get_method(method, MethodOptions()))
"""


@pytest.mark.parametrize(
    ("method", "tokens", "dtype", "shape"),
    [
        ("mesp", 200, torch.bfloat16, {"num_attention_heads": 4, "num_key_value_heads": 2}),
        ("mesp", 333, torch.float32, {"intermediate_size": 1152, "head_dim": 32}),
        ("mezo", 128, torch.bfloat16, {"hidden_size": 896, "intermediate_size": 2752}),
    ],
)
def test_as_many_kernels_are_planned_as_the_library_makes(
    method: str, tokens: int, dtype: torch.dtype, shape: dict[str, Any], tmp_path: Path
) -> None:
    shape = {**SHAPE, "num_hidden_layers": 2, "vocab_size": 2000, **shape}
    model = _write(tmp_path / "model", shape, dtype)
    done = subprocess.run(
        [sys.executable, "-c", _ONE_STEP, str(model), method, str(tokens)],
        capture_output=True, text=True, check=True,
        env={**environment(), "ONEDNN_VERBOSE": "profile_create"},
    )  # fmt: skip
    made = [
        line for line in done.stdout.splitlines()
        if "create:cache_miss" in line and "mb2ic2oc2" not in line  # `products._works`
    ]  # fmt: skip
    work = replace(
        WORK, spec=spec_from_config({**CONFIG, **shape}), config=LoraConfig(4), method=method,
        lengths=(tokens,), widened=dtype != torch.float32,
    )  # fmt: skip
    kernels = predict(work, MethodOptions()).by_kind["kernels"]
    passing = scratch_bytes(tokens, shape["hidden_size"], torch.float32)
    assert kernels == len(made) * KERNEL_BYTES + passing, made


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 3 + RANDOM_CASES))
def test_random_settings_are_predicted(seed: int, tmp_path: Path) -> None:
    plan, measured = _case(seed, tmp_path / "model")
    assert abs(plan.predicted_peak_bytes - measured) <= _bounds(measured), plan.by_kind
    assert measured <= plan.needed_bytes


ADAPTERS: list[dict[str, Any]] = [
    {"use_dora": True, "keep_blocks": 3},
    {"num_layers": 2, "rank_pattern": "down_proj=64", "optimizer": "adamw"},
    {"use_dora": True, "lora_dropout": 0.1},
    {"use_dora": True, "target_modules": "q_proj,v_proj"},
    {"use_dora": True, "method": "mezo"},
    {"use_dora": True, "recompute_h": False, "rank_pattern": "q_proj=64,up_proj=1"},
]


@pytest.mark.parametrize(
    "given",
    [pytest.param(g, marks=[] if n < 2 else pytest.mark.slow) for n, g in enumerate(ADAPTERS)],
    ids=str,
)
def test_the_prediction_of_an_adapter_is_near_what_is_measured(
    given: dict[str, Any], tmp_path: Path
) -> None:
    shape = {**SHAPE, "vocab_size": 8192}
    model = _write(tmp_path / "model", shape, torch.bfloat16)
    given = {"optimizer": "sgd", **given}
    plan = lt.plan(model=str(model), max_seq_length=256, **given)
    measured = _measured(model, {**given, "seq_len": 256})
    assert abs(plan.predicted_peak_bytes - measured) <= _bounds(measured), plan.by_kind


def test_settings_fall_from_the_fastest_to_the_smallest() -> None:
    plans = list(candidates(WORK, MethodOptions()))
    sizes = [plan.predicted_peak_bytes for plan in plans]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes) == 6 + 1 + 1 + 2 + goes_to_onednn()
    for plan in plans:
        assert choose(WORK, MethodOptions(), plan.needed_bytes).options == plan.options


def test_what_was_asked_for_is_kept() -> None:
    asked = MethodOptions(keep_blocks=2, recompute_h=False)
    found = [plan.options for plan in candidates(WORK, asked)]
    assert all(o.keep_blocks == 2 and not o.recompute_h for o in found)
    tight = choose(WORK, asked, min(p.needed_bytes for p in candidates(WORK, asked)))
    assert (tight.options.block_inputs, tight.options.tiles) == ("file", "quarter")
    assert (tight.options.products == "torch") == goes_to_onednn()


def test_too_small_a_budget_names_the_smallest_that_would_do() -> None:
    least = min(plan.needed_bytes for plan in candidates(WORK, MethodOptions()))
    with pytest.raises(ConfigError) as caught:
        choose(WORK, MethodOptions(), least - 1)
    text = str(caught.value)
    named = float(text.split("the smallest that would do is ")[1].split(" MB")[0])
    assert choose(WORK, MethodOptions(), round(named * 1e6))
    length = int(text.split("sequences of up to ")[1].split(" tokens")[0].replace(",", ""))
    assert 1 < length < 512
    shorter = replace(WORK, lengths=(length,))
    assert choose(shorter, MethodOptions(), least - 1)
    with pytest.raises(ConfigError):
        choose(replace(WORK, lengths=(length + 1,)), MethodOptions(), least - 1)
    with pytest.raises(ConfigError, match="no sequence length would fit"):
        choose(WORK, MethodOptions(), 1_000_000)


@pytest.mark.parametrize("method", ["mebp", "autograd"])
def test_methods_of_autograd_have_no_budget(method: str) -> None:
    with pytest.raises(ConfigError, match=f"Use one of {', '.join(PLANNED)}"):
        choose(replace(WORK, method=method), MethodOptions(), 10**9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "m"
    return write_small_model(directory, num_hidden_layers=4, max_position_embeddings=1024)


def test_the_command_and_the_call_agree(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(model), "--memory-budget", "20MB", "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    plan = lt.plan(model=str(model), memory_budget="20MB")
    assert told["predicted_peak_bytes"] == plan.predicted_peak_bytes == sum(plan.by_kind.values())
    assert told["by_kind"] == plan.by_kind
    assert told["settings"]["keep_blocks"] == plan.options.keep_blocks == 4
    assert told["longest_sequence"] >= 512
    assert "-> " in err


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("lots", "expected a size such as 400MB"),
        ("0%", "expected more than 0% and at most 100%"),
        ("101%", "expected more than 0% and at most 100%"),
        ("1MB", "the smallest that would do is"),
        ("-5MB", "expected a size"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(
    model: Path, budget: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", str(model), f"--memory-budget={budget}"]) == 2
    assert message in capsys.readouterr().err


def test_a_share_is_of_the_free_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["lowtide.train.budget"], "available_bytes", lambda: 40_000_000)
    half = lt.plan(model=str(model), memory_budget="50%")
    assert half == lt.plan(model=str(model), memory_budget="20MB")


def test_more_than_is_free_is_refused_before_it_is_taken(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["lowtide.train.budget"], "available_bytes", lambda: 2_000_000)
    assert main(["bench", "step", "--model", str(model), "--memory-budget", "1GB"]) == 2
    assert "MB are free" in capsys.readouterr().err


def test_a_step_takes_the_setting_that_was_planned(tmp_path: Path) -> None:
    model = _write(
        tmp_path / "model",
        {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4},
        torch.bfloat16,
    )
    flags = {"seq_len": 60, "lora_r": 4, "optimizer": "sgd"}
    shown = lt.plan(model=str(model), max_seq_length=60, lora_r=4, optimizer="sgd")
    small, large = (predict_with(model, keep) for keep in (0, 4))
    assert shown.options.keep_blocks == 0
    for plan in (small, large):
        budget = plan.needed_bytes
        measured = _measured(model, {**flags, "memory_budget": budget})
        assert measured <= budget
        assert abs(measured - plan.predicted_peak_bytes) <= _bounds(measured)


def predict_with(model: Path, keep: int) -> Plan:
    """The plan of a step that keeps so many blocks."""
    return lt.plan(model=str(model), max_seq_length=60, lora_r=4, optimizer="sgd", keep_blocks=keep)
