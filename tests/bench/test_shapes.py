"""Built-in shapes: real models' facts, and random weights that are whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import small
import torch

import lowtide as lt
from lowtide.bench import shapes
from lowtide.errors import ModelError, OutputError
from lowtide.model.families import spec_from_config

# The models' own cards and checkpoints; a tied head is counted once.
PARAMETERS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "llama-3.2-1b": 1_235_814_400,
    "smollm2-135m": 134_515_008,
}
TINY = {**small.CONFIG, "model_type": "qwen2", "hidden_size": 64, "vocab_size": 1200}


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A shape of 100,000 parameters, with biases, written by this process."""
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "tiny.json").write_text(json.dumps(TINY))
    monkeypatch.setattr(shapes, "CONFIGS", configs)

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        shapes.write_shape(command[-2], Path(command[-1]))
        return subprocess.CompletedProcess(command, 0, b"")

    monkeypatch.setattr(shapes.subprocess, "run", run)
    return "tiny"


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_has_the_parameters_of_its_model(name: str) -> None:
    spec = spec_from_config(shapes.shape_config(name))
    assert spec.n_parameters == PARAMETERS[name]
    assert shapes.weight_bytes(spec) == 2 * PARAMETERS[name]


def test_every_shape_has_a_config_and_every_config_is_a_shape() -> None:
    assert sorted(path.stem for path in shapes.CONFIGS.iterdir()) == sorted(shapes.SHAPES)


def test_a_shape_of_a_family_that_is_not_supported_says_so(tmp_path: Path) -> None:
    config = dict(shapes.shape_config("qwen3-0.6b"), model_type="unheard-of")
    (tmp_path / "new.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "CONFIGS", tmp_path)
        with pytest.raises(ModelError, match="model_type 'unheard-of' is not supported; lowtide"):
            shapes.shape_directory("new", tmp_path / "cache", print)
    assert not (tmp_path / "cache").exists()


def test_what_is_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shapes.shape_of("qwen2.5-0.5b") == "qwen2.5-0.5b"
    assert shapes.shape_of("Qwen/Qwen2.5-0.5B") is None
    assert shapes.shape_of(str(tmp_path)) is None
    (tmp_path / "qwen2.5-0.5b").mkdir()  # a user's own directory of that name
    assert shapes.shape_of("qwen2.5-0.5b") is None


def test_an_unknown_shape_is_refused_with_the_list() -> None:
    done = small.run("bench", "step", "--model", "qwen2.5-0.5", "--json")
    assert done.code == 2
    assert "there is no shape and no directory 'qwen2.5-0.5'" in done.err
    assert "did you mean 'qwen2.5-0.5b'?" in done.err
    assert ", ".join(shapes.SHAPES) in done.err
    assert done.document["kind"] == "ModelError"


def test_weights_are_said_then_written_once(tiny: str, tmp_path: Path) -> None:
    cache, said = tmp_path / "cache", []

    def say(text: str) -> None:
        assert not cache.exists()
        said.append(text)

    directory = shapes.shape_directory(tiny, cache, say)
    assert said == [f"writing 0 MB of random weights to {cache / tiny}"]
    before = small.tree(cache)
    assert set(before) == {"tiny", "tiny/config.json", "tiny/model.safetensors"}
    assert shapes.shape_directory(tiny, cache, pytest.fail) == directory
    shutil.rmtree(cache)
    shapes.shape_directory(tiny, cache, print)
    assert small.tree(cache) == before  # the seed decides


def test_weights_look_like_trained_ones(tiny: str, tmp_path: Path) -> None:
    model = lt.load_model(shapes.shape_directory(tiny, tmp_path, print))
    assert model.stored_dtypes == ["bfloat16"]
    for name in model.spec.tensor_shapes():
        values = model.checkpoint[name].double()
        mean, std = (1.0, 0.05) if name.endswith("norm.weight") else (0.0, 0.02)
        # Five standard errors of a mean and of a standard deviation.
        assert abs(float(values.mean()) - mean) < 5 * std / values.numel() ** 0.5, name
        assert abs(float(values.std()) / std - 1) < 5 / (2 * values.numel()) ** 0.5, name
    ids = torch.arange(20)
    assert lt.logits(model, None, ids.tolist()).isfinite().all()


def test_weights_are_made_a_few_megabytes_at_a_time() -> None:
    parts = shapes._file(spec_from_config(shapes.shape_config("qwen2.5-3b")))
    next(parts)  # the header
    sizes = [len(next(parts)) for _ in range(5)]  # of an embedding of 622 MB
    assert max(sizes) == 2 << 20


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    cache = tmp_path / "cache"
    whole = shapes._file

    def halfway(spec: Any) -> Any:
        parts = whole(spec)
        yield next(parts)
        yield next(parts)
        raise failure

    monkeypatch.setattr(shapes, "_file", halfway)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        shapes.shape_directory(tiny, cache, print)
    assert small.tree(cache) == {}


def test_what_a_dead_process_was_writing_is_never_taken_and_is_removed(
    tiny: str, tmp_path: Path
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    abandoned = tmp_path / f".{tiny}.{dead.pid}.tmp"
    alive = tmp_path / f".{tiny}.{os.getppid()}.tmp"
    for directory in (abandoned, alive):
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"half")
    directory = shapes.shape_directory(tiny, tmp_path, print)
    assert shapes.is_cached(tiny, tmp_path)
    assert directory == tmp_path / tiny
    assert not abandoned.exists()
    assert alive.exists()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_something_else_in_its_place_is_refused_and_left(
    tiny: str, tmp_path: Path, file: str
) -> None:
    directory = shapes.shape_directory(tiny, tmp_path, print)
    (directory / file).write_text("{}")
    with pytest.raises(ModelError, match="Remove it, or choose another --cache-dir"):
        shapes.shape_directory(tiny, tmp_path, pytest.fail)
    assert (directory / file).read_text() == "{}"


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes.shutil, "disk_usage", lambda _: Usage(10**12, 0, 500 * 10**6))
    with pytest.raises(OutputError, match=r"need 988 MB on the disk .* which has 500 MB free"):
        shapes.shape_directory("qwen2.5-0.5b", tmp_path / "cache", pytest.fail)
    assert not (tmp_path / "cache").exists()


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert shapes.cache_directory(None) == tmp_path / "lowtide" / "shapes"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somebody")
    assert shapes.cache_directory(None) == Path("/somebody/.cache/lowtide/shapes")
    assert shapes.cache_directory("~/x") == Path("/somebody/x")


@pytest.mark.slow
def test_a_real_shape_is_written_by_a_child_and_measured(tmp_path: Path) -> None:
    done = small.run_process(
        "bench", "step", "--model", "smollm2-135m", "--cache-dir", tmp_path, "--seq-len", 8,
        "--steps", 1, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.err.startswith(f"writing 269 MB of random weights to {tmp_path}/smollm2-135m\n")
    assert done.document["model"] == "smollm2-135m"
    assert done.document["peak_anon_bytes"] < 40e6  # nothing of the making is left
