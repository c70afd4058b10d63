"""Models in GGUF files: opened, split, cached, changed under the reader, and refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import KindOf, add, all_in, plain_model, random_weights, write
from small import CONFIG, run

import lowtide as lt
from lowtide.errors import ConfigError, ModelError
from lowtide.model.families import spec_from_config
from lowtide.model.gguf import home
from lowtide.model.gguf.write import gguf_model

IDS = [1, 2, 3, 60, 7]
WEIGHTS = random_weights(spec_from_config(CONFIG).tensor_shapes())


def write_file(path: Path, kind: str | KindOf = "Q8_0", **more: Any) -> dict[str, torch.Tensor]:
    return write(path, CONFIG, WEIGHTS, all_in(kind) if isinstance(kind, str) else kind, more)


@pytest.fixture
def file(tmp_path: Path, unpacked_here: None) -> Path:
    """A good file, to be broken."""
    write_file(tmp_path / "good.gguf")
    return tmp_path / "good.gguf"


def refusal(path: Path | str, **settings: Any) -> str:
    with pytest.raises(ModelError) as error:
        lt.load_model(path, **settings)
    assert error.value.exit_code == 2
    return str(error.value)


def test_a_file_is_the_model_that_it_unpacks_to(tmp_path: Path) -> None:
    """With the child process that writes config.json into the cache; the second time without."""
    path = tmp_path / "model.gguf"
    unpacked = write_file(path, "Q4_0")
    plain = lt.load_model(plain_model(tmp_path / "plain", CONFIG, unpacked))
    for _ in range(2):
        model = lt.load_model(path)
        assert lt.logits(model, None, IDS).equal(lt.logits(plain, None, IDS))
        assert (model.path, model.checkpoint.files) == (path, [path])
        assert model.directory != path.parent
        assert model.stored_dtypes == ["Q4_0", "float16", "float32"]
        assert model.storages == ("Q4_0",)


def test_the_training_process_has_no_gguf_package(tmp_path: Path) -> None:
    write_file(tmp_path / "model.gguf")
    program = (
        "import sys, lowtide\nassert 'gguf' not in sys.modules\n"
        f"lowtide.load_model({str(tmp_path / 'model.gguf')!r})\nassert 'gguf' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("damage", ["gone", "changed", "cut"])
def test_a_damaged_cache_is_made_anew(damage: str, file: Path) -> None:
    expected = lt.logits(lt.load_model(file), None, IDS)
    config = lt.load_model(file).directory / "config.json"
    if damage == "gone":
        config.unlink()
    else:
        config.write_bytes(config.read_bytes()[:-5] if damage == "cut" else b"{}")
    assert lt.logits(lt.load_model(file), None, IDS).equal(expected)


def test_a_moved_file_needs_nothing_new(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = lt.load_model(file).directory
    monkeypatch.setattr(home, "unpack_in_child", None)
    (file.parent / "deeper").mkdir()
    assert lt.load_model(file.rename(file.parent / "deeper" / file.name)).directory == before


def split(file: Path, parts: int) -> list[Path]:
    """As llama-gguf-split does: the first part has the metadata, the others say which they are."""
    reader = gguf.GGUFReader(file)
    model = gguf_model(CONFIG)
    bounds = np.linspace(0, len(reader.tensors), parts + 1).astype(int)
    paths = []
    for number in range(parts):
        path = file.with_name(f"part-{number + 1:05}-of-{parts:05}.gguf")
        writer = gguf.GGUFWriter(path, model.architecture)
        for key, value in model.metadata.items() if number == 0 else ():
            add(writer, key, value)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[bounds[number] : bounds[number + 1]]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


def test_a_split_model_by_any_of_its_parts(file: Path) -> None:
    expected = lt.logits(lt.load_model(file), None, IDS)
    paths = split(file, 3)
    for path in paths:
        model = lt.load_model(path)
        assert model.checkpoint.files == paths
        assert lt.logits(model, None, IDS).equal(expected)
    paths[1].unlink()
    said = refusal(paths[2])
    assert paths[1].name in said
    assert paths[0].name not in said.splitlines()[1]
    shutil.copy(paths[0], paths[1])
    assert "part 0, counted from 0" in refusal(paths[2])
    renamed = paths[0].rename(paths[0].with_name("first.gguf"))
    assert "-00001-of-00003.gguf" in refusal(renamed)


def test_every_cut_is_told(file: Path) -> None:
    """Wherever the file ends: in the header, or before the last tensor does."""
    whole = file.read_bytes()
    for size in [0, 3, 4, 8, 23, 24, 40, 200, 500, len(whole) // 2, len(whole) - 33]:
        file.write_bytes(whole[:size])
        said = refusal(file)
        assert "truncated" in said or "damaged" in said or "not a GGUF file" in said, (size, said)


CHANGES: list[tuple[str, Callable[[bytearray], object], str]] = [
    ("magic", lambda raw: raw.__setitem__(slice(0, 4), b"GGML"), "does not begin with GGUF"),
    ("version 1", lambda raw: raw.__setitem__(slice(4, 8), b"\1\0\0\0"), "version 1"),
    ("version 9", lambda raw: raw.__setitem__(slice(4, 8), b"\t\0\0\0"), "Use a newer lowtide"),
    ("big-endian", lambda raw: raw.__setitem__(slice(4, 8), b"\0\0\0\3"), "big-endian"),
    ("tensors", lambda raw: raw.__setitem__(slice(8, 16), b"\xff" * 8), "18,446,744,073,709,551"),
    ("keys", lambda raw: raw.__setitem__(slice(16, 24), b"\xff\xff" + b"\0" * 6), "damaged"),
    ("key length", lambda raw: raw.__setitem__(slice(24, 32), b"\xff" * 8), "length of a key"),
]


@pytest.mark.parametrize(("what", "change", "said"), CHANGES, ids=[one[0] for one in CHANGES])
def test_headers_that_lie(what: str, change: Any, said: str, file: Path) -> None:
    raw = bytearray(file.read_bytes())
    change(raw)
    file.write_bytes(raw)
    assert said in refusal(file)


def tensor_field(raw: bytes, name: str) -> int:
    """Where a tensor's number of dimensions lies."""
    return raw.index(name.encode()) + len(name)


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (0, b"\7\0\0\0", "7 dimensions"),
        (4, b"\0" * 8, "the shape"),
        (4, b"\xff" * 8, "the shape"),
        (4, b"\x21" + b"\0" * 7, "in blocks of 32 columns"),
        (12, b"\x00\x00\x01" + b"\0" * 5, "truncated"),
        (12, b"\x03" + b"\0" * 7, "wrong shape: blk.0.attn_q.weight"),
        (20, b"\x11\0\0\0", "IQ2_XS: 1 tensors"),
        (20, b"\xfa\0\0\0", "type 250: 1 tensors"),
        (24, b"\x01" + b"\0" * 7, "no multiple of 32"),
        (24, b"\xe0" + b"\xff" * 7, "truncated"),
    ],
)
def test_tensors_that_lie(at: int, value: bytes, said: str, file: Path) -> None:
    raw = bytearray(file.read_bytes())
    start = tensor_field(raw, "blk.0.attn_q.weight") + at
    raw[start : start + len(value)] = value
    file.write_bytes(raw)
    found = refusal(file)
    assert said in found
    if "tensors" in said:
        assert "Q4_K" in found
        assert "Q8_0" in found


def test_tensors_that_are_missing_twice_or_unknown(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"blk.0.attn_v.weight", b"blk.0.attn_v.wrongg"))
    said = refusal(file)
    assert "missing: blk.0.attn_v.weight (model.layers.0.self_attn.v_proj.weight)" in said
    assert "extra: blk.0.attn_v.wrongg" in said
    file.write_bytes(whole.replace(b"blk.0.attn_v.weight", b"blk.0.attn_k.weight"))
    assert "there twice" in refusal(file)


def other(path: Path, architecture: str, kind: str | None) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    if kind is not None:
        writer.add_type(kind)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "kind", "said"),
    [
        ("llama", "adapter", "is a LoRA adapter, not a model"),
        ("clip", "mmproj", "is the image or audio part of a model"),
        ("t5", None, "architecture is 't5'"),
        ("clip", None, "architecture is 'clip'"),
        ("llama", "poem", "of the type 'poem', not a model"),
    ],
)
def test_files_that_are_no_decoder(
    architecture: str, kind: str | None, said: str, tmp_path: Path, unpacked_here: None
) -> None:
    assert said in refusal(other(tmp_path / "other.gguf", architecture, kind))


def test_the_child_tells_why(tmp_path: Path) -> None:
    path = other(tmp_path / "other.gguf", "t5", None)
    said = refusal(path)
    assert str(path) in said
    assert "'t5'" in said


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    """A name that would be a hub id too is not looked for on the hub."""
    assert "there is no file" in refusal(tmp_path / "not-there.gguf")
    assert "there is no file models/x.gguf" in refusal("models/x.gguf")
    write_file(tmp_path / "one.gguf")
    assert f"Give one of them: {tmp_path}/one.gguf" in refusal(tmp_path)
    directory = tmp_path / "directory.gguf"
    directory.mkdir()
    assert "has no config.json" in refusal(directory)


def test_quantising_a_file_is_refused(file: Path, tmp_path: Path) -> None:
    assert "is a GGUF file" in refusal(file, quantize="int8")
    done = run("quantize", file, tmp_path / "out", "--quantize", "int4")
    assert done.code == 2
    assert "is a GGUF file" in done.err
    assert not (tmp_path / "out").exists()


def test_a_limit_on_resident_weights_changes_no_bit(file: Path) -> None:
    free = lt.load_model(file)
    residency = lt.load_model(file, resident_weights="1GB").residency
    assert residency is not None
    assert {span.path for piece in residency.pieces for span in piece} == {str(file)}
    limited = lt.load_model(file, resident_weights=residency.smallest_limit)
    assert lt.logits(limited, None, IDS).equal(lt.logits(free, None, IDS))
    with pytest.raises(ConfigError) as caught:
        lt.load_model(file, resident_weights=1000)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("how", ["replaced", "written", "gone"])
def test_a_file_that_changes_is_noticed(how: str, file: Path) -> None:
    model = lt.load_model(file)
    model.checkpoint.check_unchanged()
    copy = Path(shutil.copy(file, file.with_name("copy.gguf")))
    if how == "replaced":
        copy.rename(file)
    elif how == "gone":
        file.unlink()
    else:
        with open(file, "r+b") as opened:
            opened.write(b"GGUF")
        os.utime(file, ns=(1, 1))
    with pytest.raises(ModelError) as caught:
        model.checkpoint.check_unchanged()
    assert re.search(f"{file}.*(replaced|written|gone)", str(caught.value))


def test_info_shows_the_file_and_its_types(file: Path) -> None:
    done = run("info", file, "--json")
    assert done.code == 0, done.err
    assert str(file) in done.err
    assert "1 GGUF file(s)" in done.err
    sizes = done.document["bytes_by_storage"]
    spec = spec_from_config(CONFIG)
    assert set(sizes) == {"Q8_0", "float16", "float32"}
    assert json.dumps(done.document["stored_dtypes"]) == '["Q8_0", "float16", "float32"]'
    assert sum(sizes.values()) <= file.stat().st_size
    assert done.document["n_parameters"] == spec.n_parameters
