"""Merging into models that lie in GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import small
import torch
from gguf_adapters import write_both
from gguf_models import cases, relative
from safetensors.torch import load_file

import lowtide as lt
from lowtide.errors import ModelError, OutputError
from lowtide.export.compare import compare
from lowtide.export.gguf import export_model
from lowtide.export.merge import merge

CONFIG: dict[str, Any] = {**cases()["llama-yarn"], "hidden_size": 64, "head_dim": 16}
IDS = list(range(3, 30))
pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer.json")


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    return write_both(tmp_path, CONFIG, {"use_dora": True})


def numbers(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def logits(model: Path, adapter: Path | None) -> torch.Tensor:
    decoder = lt.load_model(model, "float64")
    return lt.logits(decoder, lt.Adapter.load(adapter, decoder) if adapter else None, IDS)


def test_the_same_model_gives_the_same_weights(both: tuple[Path, Path], tmp_path: Path) -> None:
    """Whether it comes as a directory or as a file, and goes into one or the other."""
    model, adapter = both
    export_model(model, tmp_path / "base.gguf", dtype="f32")
    merge(model, adapter, tmp_path / "truth")
    report = merge(tmp_path / "base.gguf", adapter, tmp_path / "out")
    assert report.dtypes == ["float32"]
    ours, truth = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "truth"))
    assert ours.keys() == truth.keys()
    assert all(ours[name].equal(truth[name]) for name in truth)
    assert all(one.problem is None for one in compare(tmp_path / "out", model, adapter))
    merge(model, adapter, tmp_path / "one.gguf")
    merge(tmp_path / "base.gguf", adapter, tmp_path / "two.gguf")
    one, two = numbers(tmp_path / "one.gguf"), numbers(tmp_path / "two.gguf")
    assert all(np.array_equal(one[name], two[name]) for name in one | two)
    assert all(one.problem is None for one in compare(tmp_path / "two.gguf", model, adapter))


@pytest.mark.parametrize("dtype", ["q8_0", "f16"])
def test_a_quantised_file_is_merged_dequantised(
    dtype: str, both: tuple[Path, Path], tmp_path: Path
) -> None:
    model, adapter = both
    export_model(model, tmp_path / "base.gguf", dtype=dtype)
    merge(tmp_path / "base.gguf", adapter, tmp_path / "out", dtype="float32")
    truth = logits(tmp_path / "base.gguf", adapter)
    assert relative(logits(tmp_path / "out", None), truth) < 1e-6
    assert relative(logits(model, adapter), truth) > 1e-5, "what the file's dtype cost stays"
    usual = merge(tmp_path / "base.gguf", adapter, tmp_path / "usual").dtypes
    assert usual == ["bfloat16" if dtype == "q8_0" else "float16"]


def test_a_file_remembers_what_was_merged(both: tuple[Path, Path], tmp_path: Path) -> None:
    model, adapter = both
    merge(model, adapter, tmp_path / "merged.gguf")
    export_model(tmp_path / "merged.gguf", tmp_path / "copy.gguf", dtype="f16")
    merge(model, adapter, tmp_path / "merged")
    export_model(tmp_path / "merged", tmp_path / "file.gguf")
    for base in ("merged.gguf", "copy.gguf", "file.gguf"):
        for out in ("twice.gguf", "twice"):
            with pytest.raises(ModelError, match=f"{base} has this adapter in it already"):
                merge(tmp_path / base, adapter, tmp_path / out)
    with pytest.raises(OutputError, match="is read for this"):
        export_model(tmp_path / "copy.gguf", tmp_path / "copy.gguf", overwrite=True)
    assert not (tmp_path / "twice").exists()


def test_its_tokenizer_comes_along(tmp_path: Path) -> None:
    model = small.write_small_model(tmp_path / "model")
    adapter = tmp_path / "adapter"
    lt.Adapter.create(lt.load_model(model), lt.LoraConfig(use_dora=True)).save(adapter)
    export_model(model, tmp_path / "base.gguf")
    merge(tmp_path / "base.gguf", adapter, tmp_path / "out")
    prompt = ("generate", "--prompt", "The number", "--max-tokens", 20, "--json", "--model")
    assert small.run(*prompt, tmp_path / "out").document == small.run(*prompt, model).document
    export_model(tmp_path / "base.gguf", tmp_path / "copy.gguf", dtype="f16")
    one, two = (
        {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
        for path in (tmp_path / "base.gguf", tmp_path / "copy.gguf")
    )
    assert {key for key in one | two if one.get(key) != two.get(key)} == {"general.file_type"}
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert not [name for name in held if "gguf" in name]
