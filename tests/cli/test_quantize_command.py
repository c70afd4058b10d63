"""`lowtide quantize`, and `--quantize` of the commands that open a model."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import small
from helpers import asset

from lowtide.weights.storages import STORAGES

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "int4"
    assert small.run("quantize", model, out).code == 0
    return out


def refused(outcome: small.Outcome, *parts: str, code: int = 2) -> None:
    assert outcome.code == code, outcome
    assert outcome.err.splitlines()[-1].startswith("lowtide: ") or "lowtide: " in outcome.err
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err, f"{part!r} is not in:\n{outcome.err}"


def test_it_prints_the_errors_of_every_matrix(model: Path, tmp_path: Path) -> None:
    done = small.run("quantize", model, tmp_path / "out", "--quantize", "int8", "--json")
    assert done.code == 0, done.err
    document = done.document
    errors = document["relative_rms_errors"]
    assert document["storage"] == "int8"
    assert document["source_bytes"] == (model / FILE).stat().st_size
    assert document["weights_bytes"] == (tmp_path / "out" / FILE).stat().st_size
    worst = max(errors, key=errors.get)
    assert f"{errors[worst]:8.3%}  {worst}" in done.err
    assert len(errors) == 15
    assert all(0 < error < 0.02 for error in errors.values())


def test_commands_run_on_a_quantised_model(
    model: Path, quantized: Path, data: Path, tmp_path: Path
) -> None:
    info = small.run("info", quantized, "--json")
    assert info.document["stored_dtypes"] == ["float32", "int4"]
    assert "int4" in info.err
    common = ("--data", data, "--max-seq-length", 32)
    for name, opened in (("a", (quantized,)), ("b", (model, "--quantize", "int4"))):
        trained = small.run(
            "train", "--model", *opened, *common, "--adapter-path", tmp_path / name, "--iters", 2
        )
        assert trained.code == 0, trained.err
        assert "float32/int4 mapped from" in trained.out
    a, b = (tmp_path / name / "adapter_model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    adapter = ("--adapter-path", tmp_path / "a")
    losses, texts = [], []
    for opened in ((quantized,), (model, "--quantize", "int4")):
        evaluated = small.run("eval", "--model", *opened, *common, *adapter, "--json")
        losses.append(evaluated.document["loss"])
        generated = small.run(
            "generate", "--model", *opened, *adapter, "--prompt", "The", "--max-tokens", 5, "--json"
        )
        texts.append(generated.document["text"])
    assert losses[0] == losses[1]
    assert texts[0] == texts[1]
    step = small.run(
        "bench", "step", "--model", model, "--quantize", "int8", "--seq-len", 8, "--steps", 1,
        "--json",
    )  # fmt: skip
    assert step.document["quantize"] == "int8"


@pytest.mark.parametrize("storage", STORAGES)
def test_check_passes_on_quantised_weights(storage: str, model: Path, data: Path) -> None:
    """Against autograd in float64 on the dequantised weights."""
    done = small.run(
        "check", "--model", model, "--data", data, "--max-seq-length", 32,
        "--quantize", storage, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.document["passed"]
    assert done.document["truth"] == "autograd float64"


def test_verifying(quantized: Path, tmp_path: Path) -> None:
    done = small.run("quantize", quantized, "--verify")
    assert done.code == 0
    assert "as they were written" in done.out
    copy = Path(shutil.copytree(quantized, tmp_path / "copy"))
    raw = bytearray((copy / FILE).read_bytes())
    raw[-1] ^= 1
    (copy / FILE).write_bytes(raw)
    refused(small.run("quantize", copy, "--verify"), "is damaged: 1 of", "down_proj.weight.scales")


def test_a_damaged_quantised_model_is_refused_by_commands(
    quantized: Path, data: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(quantized, tmp_path / "copy"))
    (copy / FILE).write_bytes((copy / FILE).read_bytes()[:-100])
    for command in (("info", copy), ("eval", "--model", copy, "--data", data)):
        refused(small.run(*command), "is truncated, or another file. Run `lowtide quantize` again")


def test_mistakes_are_told(model: Path, quantized: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(small.run("quantize", model), "OUT is missing")
    refused(small.run("quantize"), "--model is required")
    refused(small.run("quantize", tmp_path / "nowhere", out), "does not exist")
    refused(small.run("quantize", model, out, "--quantize", "int3"), "choose int8", "did you mean")
    refused(small.run("quantize", quantized, out), "is quantised already (int4)")
    refused(small.run("quantize", model, quantized), "already holds a quantised model", "--overw")
    refused(small.run("quantize", model, model), "is the model itself")
    refused(small.run("quantize", model, data), "is a file")
    refused(
        small.run("train", "--model", quantized, "--quantize", "int8", "--data", data,
                  "--adapter-path", out),
        "is quantised already (int4)", "without --quantize",
    )  # fmt: skip
    refused(small.run("eval", "--model", model, "--data", data, "--quantize", "q4"), "choose int8")
    assert not out.exists()


def test_other_quantisations_are_refused(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "gptq"))
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    refused(small.run("quantize", copy, tmp_path / "out"), "give unquantised weights")


def test_a_file_that_may_not_grow(model: Path, tmp_path: Path) -> None:
    """What a full disk does too: a clear message, and nothing left behind."""
    done = small.run_process(
        "quantize", model, tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    refused(done, "cannot be written: File too large", "Free some space")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_real_model_keeps_its_loss_in_int8() -> None:
    """Within half a percent, on five stories that the model was not trained on."""
    model = asset("models/stories260K/hf-llama")
    stories = asset("data/tinystories_sample/tinystories_sample.txt")
    command = ("eval", "--model", model, "--data", stories, "--max-seq-length", 128, "--json")
    losses = [small.run(*command, *more).document["loss"] for more in ((), ("--quantize", "int8"))]
    assert losses[1] == pytest.approx(losses[0], rel=0.005)
