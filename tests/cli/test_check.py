"""`lowtide check`: what it prints, what it refuses, and that a wrong gradient does not pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small
import torch
from torch import Tensor

from lowtide.cli import check_command
from lowtide.methods import METHODS, get_method
from lowtide.methods.mesp import Mesp
from lowtide.weights.writer import write_safetensors

EXACT = [name for name in METHODS if name != "autograd" and get_method(name).exact]
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BROKEN = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


def check(model: Path, data: Path, *more: object) -> small.Outcome:
    given = ("--model", model, "--data", data, "--max-seq-length", 32)
    return small.run("check", *given, *more)


class Scaling:
    """A sink that passes one gradient on a little too long."""

    def __init__(self, sink: Any) -> None:
        self.sink = sink

    def add(self, name: str, grad: Tensor) -> None:
        self.sink.add(name, grad * 1.001 if name == BROKEN else grad)


@pytest.fixture
def broken_mesp(monkeypatch: pytest.MonkeyPatch) -> None:
    """mesp with one gradient a thousandth too long, of every precision."""
    step = Mesp.step

    def wrong(self: Mesp, model: Any, adapter: Any, batch: Any, sink: Any, s: Any) -> float:
        return step(self, model, adapter, batch, Scaling(sink), s)

    monkeypatch.setattr(Mesp, "step", wrong)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_every_method_passes(kind: str, data: Path, tmp_path: Path) -> None:
    directory = small.write_small_model(tmp_path / kind, model_type=kind)
    done = check(directory, data, "--json")
    assert done.code == 0, done.err
    found = done.document
    assert found["passed"] is True
    assert found["failures"] == []
    assert found["truth"] == "autograd float64"
    assert 0 < found["worst_relative_error"] < 1e-4
    assert found["worst_parameter"].startswith("base_model.model.model.layers.")
    assert found["cosine"] > 1 - 1e-9
    assert set(found["bounds"]) == {"float32", "float64"}
    assert found["n_tokens"] == 2 * 31
    assert "mesp" in EXACT
    for method in EXACT:
        entry = found["methods"][method]
        assert entry["exact"] is True
        seen = [(one["precision"], one["against"]) for one in entry["comparisons"]]
        assert seen == [
            ("float64", "autograd float64"),
            ("float32", "autograd float64"),
            ("float32", "autograd float32"),
        ]
        for one in entry["comparisons"]:
            assert one["passed"] is True
            assert list(one["modules"]) == MODULES
            worst = max(one["modules"].values(), key=lambda m: m["worst_relative_error"])
            assert worst["worst_parameter"] == one["worst_parameter"]
            assert 0 < one["worst_relative_error"] <= one["bound"]
        assert entry["comparisons"][0]["worst_relative_error"] < 1e-12
        assert entry["comparisons"][1]["worst_relative_error"] > 1e-9
    mezo = found["methods"]["mezo"]
    assert mezo["exact"] is False
    # |N(0, 1)| sizes of theory's: over 5 of them once in a million.
    assert abs(mezo["cosine"]) < 5 * mezo["expected_cosine"] < 0.1


def test_the_table_names_methods_precisions_and_modules(model: Path, data: Path) -> None:
    done = check(model, data)
    assert done.code == 0, done.err
    assert done.err == ""
    lines = done.out.splitlines()
    for method in EXACT:
        starts = [f"{method:<8} float64  autograd float64", f"{method:<8} float32  autograd float"]
        assert all(any(line.startswith(start) for line in lines) for start in starts)
    assert [line.split()[0] for line in lines if line.split()[:1] and "proj " in line][-7:] == (
        MODULES
    )
    assert any(line.startswith("mezo is not exact: cosine with the truth") for line in lines)
    assert lines[-1] == "passed: every gradient is within its bound"


@pytest.mark.usefixtures("broken_mesp")
def test_a_wrong_gradient_fails_and_is_named(model: Path, data: Path) -> None:
    done = check(model, data, "--json")
    assert done.code == 1
    found = done.document
    assert found["passed"] is False
    assert found["worst_parameter"] == BROKEN
    assert found["worst_relative_error"] == pytest.approx(1e-3, rel=0.02)
    assert {(f["method"], f["parameter"]) for f in found["failures"]} == {("mesp", BROKEN)}
    assert {f["precision"] for f in found["failures"]} == {"float32", "float64"}
    text = check(model, data)
    assert text.code == 1
    assert f"FAILED mesp in float64 against autograd float64: {BROKEN} is off by 1.00e-03" in (
        text.out
    )
    assert "passed" not in text.out


def test_in_float64_only_float64_is_compared(model: Path, data: Path) -> None:
    found = check(model, data, "--compute-dtype", "float64", "--json").document
    assert found["worst_relative_error"] < 1e-12
    for method in EXACT:
        assert [c["precision"] for c in found["methods"][method]["comparisons"]] == ["float64"]


def test_dropout_and_a_lone_module(model: Path, data: Path) -> None:
    found = check(
        model, data, "--lora-dropout", 0.3, "--target-modules", "k_proj", "--lora-r", 2, "--json"
    ).document
    assert found["passed"] is True
    assert found["n_parameters"] == 2 * 2 * (32 + 16)
    assert list(found["methods"]["mesp"]["comparisons"][0]["modules"]) == ["k_proj"]
    assert (
        check(model, data, "--target-modules", "k_proj", "--json").document["loss"]
        != (found["loss"])
    )


def test_the_users_own_adapter(model: Path, data: Path, adapter: Path) -> None:
    own = check(model, data, "--adapter-path", adapter, "--json")
    assert own.code == 0, own.err
    assert own.document["loss"] != check(model, data, "--json").document["loss"]


def test_a_fresh_adapters_zero_gradients_are_no_failure(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """B is zero and so is the gradient of A, on both sides."""
    import lowtide as lt

    lt.Adapter.create(lt.load_model(model)).save(tmp_path / "fresh")
    done = check(model, data, "--adapter-path", tmp_path / "fresh", "--json")
    assert done.code == 0, done.err


def test_records_and_seed(model: Path, data: Path) -> None:
    one, three = (check(model, data, "--records", n, "--json").document for n in (1, 3))
    assert (one["n_tokens"], three["n_tokens"]) == (31, 3 * 31)
    assert check(model, data, "--records", 1000, "--json").document["n_tokens"] > 3 * 31
    assert one == check(model, data, "--records", 1, "--json").document | {
        "available_bytes": one["available_bytes"]
    }
    assert check(model, data, "--records", 1, "--seed", 1, "--json").document["loss"] != one["loss"]


def test_too_little_memory_is_refused(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_command, "available_bytes", lambda: 3_000_000)
    done = check(model, data)
    assert done.code == 2
    assert "3 MB are available" in done.err
    assert "Lower --records, --max-seq-length or --lora-r" in done.err


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--max-seq-length", "65"], ["--max-seq-length 65", "64 positions"]),
        (["--records", "0"], ["records = 0: expected at least 1"]),
        (["--method", "mesp"], ["unknown argument '--method'"]),
        (["--target-modules", "w_proj"], ["target_modules 'w_proj'"]),
        (["--adapter-path", "/nowhere"], ["/nowhere"]),
        (["--mask-prompt"], ["--mask-prompt needs prompts to mask"]),
        (["--data", "/nowhere.jsonl"], ["/nowhere.jsonl"]),
    ],
)
def test_wrong_input(model: Path, data: Path, flags: list[str], parts: list[str]) -> None:
    done = check(model, data, *flags)
    assert done.code == 2, done
    assert done.err.startswith("lowtide: ")
    for part in parts:
        assert part in done.err


def test_weights_that_make_the_loss_nan(data: Path, tmp_path: Path) -> None:
    directory = small.write_small_model(tmp_path / "nan")
    weights = small.small_weights(small.CONFIG)
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    write_safetensors(directory / "model.safetensors", weights)
    done = check(directory, data)
    assert done.code == 1
    assert "the loss is nan" in done.err
    assert "Traceback" not in done.err
