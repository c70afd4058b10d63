"""Quantising a checkpoint: in small pieces, resumable, and told apart from what it is not."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from helpers import SHAPES, write_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowtide as lt
from lowtide.errors import ConfigError, ModelError, OutputError
from lowtide.model.quantized import quantize_model, verify_model
from lowtide.weights import quantize as module
from lowtide.weights.manifest import MANIFEST_FILE, PARTIAL_FILE, Manifest
from lowtide.weights.storages import STORAGES
from lowtide.weights.storages.int4 import Int4

FILE = "model.safetensors"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return small.write_small_model(tmp_path / "source")


@pytest.fixture
def quantized(source: Path, tmp_path: Path) -> Path:
    quantize_model(str(source), tmp_path / "quantized", "int4")
    return tmp_path / "quantized"


def change(path: Path, name: str, how: Callable[[Tensor], Tensor]) -> None:
    """Rewrite a safetensors file with one tensor changed."""
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    tensors[name] = how(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("chunk", [64, 1 << 18])
def test_a_file_written_in_pieces_holds_what_whole_matrices_give(
    name: str, chunk: int, odd_model: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "_CHUNK", chunk)
    directory = odd_model("llama-biases-llama3", torch.bfloat16)
    manifest = quantize_model(str(directory), tmp_path / "out", name)
    before, after = load_file(directory / FILE), load_file(tmp_path / "out" / FILE)
    for key, tensor in before.items():
        if tensor.dim() == 1:
            assert after.pop(key).equal(tensor), "norms and biases stay as they are stored"
            continue
        parts = STORAGES[name].encode(tensor.float())
        assert all(after.pop(f"{key}.{part}").equal(held) for part, held in parts.items())
    assert after == {}
    assert verify_model(tmp_path / "out") == manifest


def test_errors_are_those_of_the_weights(source: Path, tmp_path: Path) -> None:
    manifest = quantize_model(str(source), tmp_path / "out", "int4")
    before = lt.load_model(source, "float64")
    after = lt.load_model(tmp_path / "out", "float64")
    names = {name for name, shape in before.spec.tensor_shapes().items() if len(shape) == 2}
    assert set(manifest.relative_rms_errors) == names
    pairs = {"model.embed_tokens.weight": (before.embedding, after.embedding)}
    for layer, (old, new) in enumerate(zip(before.linears, after.linears, strict=True)):
        for name in old:
            pairs[f"model.layers.{layer}.{name}.weight"] = (old[name].weight, new[name].weight)
    for name, (old_weight, new_weight) in pairs.items():
        w = old_weight.whole().double()
        expected = float((new_weight.whole() - w).norm() / w.norm())
        # Differences and sums were formed in float32 and float64, of weights near one scale.
        assert manifest.relative_rms_errors[name] == pytest.approx(expected, rel=1e-5)


def test_a_quantised_model_is_an_ordinary_directory(source: Path, quantized: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (quantized / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((quantized / "config.json").read_text())
    assert config.pop("quantization_config") == {"lowtide_storage": "int4"}
    assert config == json.loads((source / "config.json").read_text())
    assert sorted(path.name for path in quantized.iterdir()) == [
        "config.json", MANIFEST_FILE, FILE, "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert lt.load_model(quantized).stored_dtypes == ["float32", "int4"]


def test_transformers_refuses_it(quantized: Path) -> None:
    """Without the mark in config.json it would start from random weights."""
    import transformers

    with pytest.raises(ValueError, match="no `quant_method`"):
        transformers.AutoModelForCausalLM.from_pretrained(quantized)


def test_shards_and_one_file_give_the_same(odd_model: Callable[..., Path], tmp_path: Path) -> None:
    write_model(tmp_path / "sharded", SHAPES["qwen2-gqa3-untied"], max_shard_size="20KB")
    whole = odd_model("qwen2-gqa3-untied")
    for name, directory in (("a", whole), ("b", tmp_path / "sharded")):
        quantize_model(str(directory), tmp_path / name, "int4-asym")
    assert len(Manifest.find(tmp_path / "b").source) > 1  # type: ignore[union-attr]  # it is there
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


class _Stop(BaseException):
    """Comes as Ctrl-C does."""


@pytest.fixture
def interrupted(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory where the sixth matrix was being quantised when the process ended."""
    encoded = 0
    encode = Int4.encode

    def stopping(self: Int4, rows: Tensor) -> dict[str, Tensor]:
        nonlocal encoded
        encoded += 1
        if encoded == 6:
            raise _Stop
        return encode(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Int4, "encode", stopping)
        with pytest.raises(_Stop):
            quantize_model(str(source), tmp_path / "out", "int4")
    return tmp_path / "out"


@pytest.fixture
def encodes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what is encoded from now on."""
    seen: list[tuple[int, ...]] = []
    encode = Int4.encode

    def counted(self: Int4, rows: Tensor) -> dict[str, Tensor]:
        seen.append(tuple(rows.shape))
        return encode(self, rows)

    monkeypatch.setattr(Int4, "encode", counted)
    return seen


MATRICES = 15


def test_an_interrupted_work_goes_on(
    source: Path, quantized: Path, interrupted: Path, encodes: list[tuple[int, ...]]
) -> None:
    with pytest.raises(ModelError, match="holds a quantised model that was not finished"):
        lt.load_model(interrupted)
    quantize_model(str(source), interrupted, "int4")
    assert len(encodes) == MATRICES - 5
    assert small.tree(interrupted) == small.tree(quantized)


def test_a_finished_tensor_that_was_damaged_is_made_again(
    source: Path, quantized: Path, interrupted: Path, encodes: list[tuple[int, ...]]
) -> None:
    """As after a power cut, which kept the journal and lost what was not on the disk yet."""
    partial = interrupted / PARTIAL_FILE
    raw = bytearray(partial.read_bytes())
    at = int.from_bytes(raw[:8], "little") + 8 + 100  # inside the embedding, the first tensor
    raw[at] ^= 1
    partial.write_bytes(raw)
    with open(interrupted / module.JOURNAL_FILE, "a") as file:
        file.write('{"name": "model.lay')  # a line that was being written
    with pytest.MonkeyPatch.context() as patch:  # and again, when all is written
        patch.setattr(module.os, "fsync", lambda descriptor: (_ for _ in ()).throw(_Stop))
        with pytest.raises(_Stop):
            quantize_model(str(source), interrupted, "int4")
    assert len(encodes) == MATRICES - 4
    quantize_model(str(source), interrupted, "int4")
    assert len(encodes) == MATRICES - 4, "the journal is whole again"
    assert small.tree(interrupted) == small.tree(quantized)


@pytest.mark.parametrize("what", ["source", "storage"])
def test_an_interrupted_work_of_another_model_is_begun_anew(
    what: str, source: Path, interrupted: Path, tmp_path: Path, encodes: list[tuple[int, ...]]
) -> None:
    if what == "source":
        change(source / FILE, Q, lambda w: w + 1)
    storage = "int4" if what == "source" else "int4-g64"
    quantize_model(str(source), interrupted, storage)
    assert len(encodes) == MATRICES
    quantize_model(str(source), tmp_path / "fresh", storage)
    assert small.tree(interrupted) == small.tree(tmp_path / "fresh")


def test_a_disk_that_fills_at_once_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutputError, match="No space left on device") as error:
        quantize_model(str(source), tmp_path / "out", "int4")
    assert "are finished" not in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_fills_later_keeps_what_is_finished(
    source: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0
    pwrite = os.pwrite

    def filling(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 20_000:
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", filling)
        with pytest.raises(OutputError, match=r"goes on after the \d+ tensors that are finished"):
            quantize_model(str(source), tmp_path / "out", "int4")
    quantize_model(str(source), tmp_path / "out", "int4")
    assert small.tree(tmp_path / "out") == small.tree(quantized)


def test_two_processes_do_not_write_the_same_file(
    source: Path, interrupted: Path, tmp_path: Path
) -> None:
    with open(interrupted / PARTIAL_FILE, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another lowtide process is quantising into"):
            quantize_model(str(source), interrupted, "int4")


def test_memory_does_not_depend_on_the_model(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor of more than one piece is ever made, whatever the matrix."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's own
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(module, "_CHUNK", 512)
    checked = lt.load_model(source).checkpoint.files
    tensors = lt.load_model(source).spec.tensor_shapes()
    assert max(torch.Size(shape).numel() for shape in tensors.values()) > 8000
    (tmp_path / "out").mkdir()
    for storage in STORAGES.values():
        with Watch():
            module.quantize_files(checked, tmp_path / "out", tensors, storage)
    # A row of 32 or 40 is filled up to two groups of 64 where its two halves are packed.
    assert 0 < largest <= 4 * 512


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(bad: float, source: Path, tmp_path: Path) -> None:
    change(source / FILE, Q, lambda w: w.index_fill(1, torch.tensor([3]), bad))
    with pytest.raises(ModelError, match=f"{Q} holds weights that are not finite"):
        quantize_model(str(source), tmp_path / "out", "int8")


def test_what_cannot_be_quantised_is_told(source: Path, quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'int3': choose int8, .*; did you mean 'int"):
        quantize_model(str(source), tmp_path / "out", "int3")
    with pytest.raises(ModelError, match=r"is quantised already \(int4\)"):
        quantize_model(str(quantized), tmp_path / "out", "int4")
    with pytest.raises(ModelError, match="is quantised already"):
        lt.load_model(quantized, quantize="int8")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        quantize_model(str(source), tmp_path / "file", "int4")
    with pytest.raises(OutputError, match="is the model itself"):
        quantize_model(str(source), source, "int4", overwrite=True)
    with pytest.raises(OutputError, match="did not write"):
        quantize_model(str(source), tmp_path, "int4", overwrite=True)
    with pytest.raises(OutputError, match="already holds a quantised model"):
        quantize_model(str(source), quantized, "int8")
    with pytest.raises(ModelError, match="is not a model that `lowtide quantize` wrote"):
        verify_model(source)
    assert not (tmp_path / "out").exists()


def test_overwriting(source: Path, quantized: Path, tmp_path: Path) -> None:
    quantize_model(str(source), quantized, "int8", overwrite=True)
    quantize_model(str(source), tmp_path / "fresh", "int8")
    assert small.tree(quantized) == small.tree(tmp_path / "fresh")


def truncated(directory: Path) -> None:
    path = directory / FILE
    path.write_bytes(path.read_bytes()[:-100])


def of_another_model(directory: Path) -> None:
    """The same size, another header."""
    path = directory / FILE
    path.write_bytes(path.read_bytes().replace(b"layers.0.mlp.up_proj", b"layers.9.mlp.up_proj"))


def without_weights(directory: Path) -> None:
    (directory / FILE).unlink()


def without_manifest(directory: Path) -> None:
    (directory / MANIFEST_FILE).unlink()


def with_a_broken_manifest(directory: Path) -> None:
    (directory / MANIFEST_FILE).write_text("{")


def with_an_unknown_storage(directory: Path) -> None:
    path = directory / MANIFEST_FILE
    path.write_text(path.read_text().replace('"storage": "int4"', '"storage": "int3"'))


DAMAGES: dict[Callable[[Path], None], str] = {
    truncated: "it is truncated, or another file. Run `lowtide quantize` again",
    of_another_model: "its header has another checksum. Run `lowtide quantize` again",
    without_weights: "has no model.safetensors",
    without_manifest: f"there is no {MANIFEST_FILE} beside it",
    with_a_broken_manifest: f"{MANIFEST_FILE} cannot be used",
    with_an_unknown_storage: "its format or storage is not known",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_directory_is_refused_when_opened(
    damage: Callable[[Path], None], quantized: Path
) -> None:
    damage(quantized)
    with pytest.raises(ModelError, match=re.escape(DAMAGES[damage])):
        lt.load_model(quantized)


def test_verifying_names_what_is_damaged(quantized: Path) -> None:
    verify_model(quantized)
    raw = bytearray((quantized / FILE).read_bytes())
    raw[-1] ^= 1
    (quantized / FILE).write_bytes(raw)
    lt.load_model(quantized)  # opening reads no weights
    with pytest.raises(ModelError, match=r"is damaged: 1 of \d+ tensors") as error:
        verify_model(quantized)
    assert list(load_file(quantized / FILE))  # still a safetensors file
    assert "model.layers.1.mlp.down_proj.weight.scales" in str(error.value)


def test_a_manifest_knows_its_source(source: Path, quantized: Path, tmp_path: Path) -> None:
    manifest = Manifest.find(quantized)
    assert manifest is not None
    file = source / FILE
    assert manifest.matching([file]) == manifest
    os.utime(file, ns=(1, 1))
    touched = manifest.matching([file])
    assert touched is not None
    assert touched.source[0].mtime_ns == 1
    # The same name, size and time, other bytes: only a checksum would tell.
    other = Path(shutil.copytree(source, tmp_path / "other")) / FILE
    change(other, Q, lambda w: -w)
    assert other.stat().st_size == file.stat().st_size
    assert manifest.matching([other]) is None
    assert manifest.matching([file, other]) is None
    assert manifest.matching([]) is None


def test_the_journal_is_only_trusted_for_the_same_layout(
    source: Path, interrupted: Path, encodes: list[Any]
) -> None:
    path = interrupted / PARTIAL_FILE
    path.write_bytes(path.read_bytes()[:-8])
    quantize_model(str(source), interrupted, "int4")
    assert len(encodes) == MATRICES
    verify_model(interrupted)
