"""The cache of `--quantize`: made once, and renewed whenever it is not of the model's bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import small
from safetensors.torch import load_file, save_file

import lowtide as lt
from lowtide.errors import ConfigError, LowtideError, ModelError, OutputError
from lowtide.model import quantized
from lowtide.weights.manifest import MANIFEST_FILE

FILE = "model.safetensors"
IDS = [3, 1, 4, 1, 5]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return small.write_small_model(tmp_path / "source")


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Command lines of the children, which run in this process."""
    seen: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        seen.append(command)
        done = small.run(*command[4:])
        return subprocess.CompletedProcess(command, done.code, done.out.encode())

    monkeypatch.setattr(quantized.subprocess, "run", run)
    return seen


def change(source: Path) -> None:
    """Other weights under the same name, of the same size, with the same time."""
    path = source / FILE
    time = path.stat().st_mtime_ns
    tensors = {name: -tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(time + 1, time + 1))


def test_it_is_made_by_a_child_once_and_is_what_the_command_writes(
    source: Path, tmp_path: Path
) -> None:
    model = lt.load_model(source, quantize="int4")
    cache = quantized.cache_directory(source, "int4")
    assert cache.is_relative_to(tmp_path / "cache" / "lowtide" / "quantized")
    assert model.directory == source, "config.json and the tokenizer are the model's own"
    assert model.checkpoint.directory == cache
    assert small.run("quantize", source, tmp_path / "out").code == 0
    assert small.tree(cache) == small.tree(tmp_path / "out")
    again = lt.logits(lt.load_model(source, quantize="int4"), None, IDS)
    assert again.equal(lt.logits(lt.load_model(tmp_path / "out"), None, IDS))


def test_each_model_and_storage_has_its_own(source: Path, children: list[list[str]]) -> None:
    other = Path(shutil.copytree(source, source.parent / "elsewhere" / source.name))
    change(other)
    logits = [
        lt.logits(lt.load_model(model, quantize=storage), None, IDS)
        for _ in range(2)
        for model in (source, other)
        for storage in ("int4", "int8")
    ]
    assert len(children) == 4
    assert all(a.equal(b) for a, b in zip(logits[:4], logits[4:], strict=True))
    assert not any(logits[0].equal(one) for one in logits[1:4])


def test_a_changed_model_is_quantised_again(
    source: Path, children: list[list[str]], tmp_path: Path
) -> None:
    lt.load_model(source, quantize="int4")
    change(source)
    renewed = lt.logits(lt.load_model(source, quantize="int4"), None, IDS)
    assert len(children) == 2
    assert small.run("quantize", source, tmp_path / "out").code == 0
    assert renewed.equal(lt.logits(lt.load_model(tmp_path / "out"), None, IDS))


def test_a_model_that_was_only_touched_is_not(source: Path, children: list[list[str]]) -> None:
    lt.load_model(source, quantize="int4")
    os.utime(source / FILE, ns=(1, 1))
    lt.load_model(source, quantize="int4")
    assert len(children) == 1
    manifest = quantized.Manifest.find(quantized.cache_directory(source, "int4"))
    assert manifest is not None
    assert manifest.source[0].mtime_ns == 1, "so that the file is not read the next time"


@pytest.mark.parametrize("damage", ["truncated", "without manifest", "broken manifest", "empty"])
def test_a_damaged_cache_is_made_again(
    damage: str, source: Path, children: list[list[str]]
) -> None:
    before = lt.logits(lt.load_model(source, quantize="int4"), None, IDS)
    cache = quantized.cache_directory(source, "int4")
    if damage == "truncated":
        (cache / FILE).write_bytes((cache / FILE).read_bytes()[:-1])
    elif damage == "without manifest":
        (cache / MANIFEST_FILE).unlink()
    elif damage == "broken manifest":
        (cache / MANIFEST_FILE).write_text("[1]")
    else:
        shutil.rmtree(cache)
        cache.mkdir()
    assert lt.logits(lt.load_model(source, quantize="int4"), None, IDS).equal(before)
    assert len(children) == 2


def test_what_cannot_be_is_told_before_a_child_is_started(
    source: Path, children: list[list[str]]
) -> None:
    with pytest.raises(ConfigError, match="'int5': choose int8"):
        lt.load_model(source, quantize="int5")
    (source / FILE).unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        lt.load_model(source, quantize="int4")
    assert children == []


def test_errors_of_the_child_are_raised_here(
    source: Path, children: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(OutputError, match="No space left on device"):
            lt.load_model(source, quantize="int4")
    killed = subprocess.CompletedProcess([], -9, b"")
    monkeypatch.setattr(quantized.subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(LowtideError, match="stopped with exit code -9"):
        lt.load_model(source, quantize="int4")
