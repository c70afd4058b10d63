"""GGUF files that lowtide writes: held to llama.cpp, and to the gguf package's own reader.

llama.cpp is the independent truth, since our reader and our writer share one map. What it computed
is in golden/llama_cpp_logits.json (see gguf_models.py); slow tests ask it again.
"""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from gguf_models import (
    GOLDEN,
    cases,
    digest,
    ids_of,
    kept,
    llama_cpp_logits,
    relative,
    tolerance,
    weights,
    write_model,
)
from small import write_small_tokenizer

import lowtide as lt
from lowtide.data.tokenizer import Tokenizer
from lowtide.errors import ConfigError, ModelError, OutputError
from lowtide.export.gguf_model import GGUF_DTYPES, write_gguf
from lowtide.export.gguf_tokenizer import tokenizer_metadata
from lowtide.model.gguf.tensors import gguf_tensors, row_order

CASES = cases()
RECORDED = json.loads(GOLDEN.read_text(encoding="utf-8"))
SQUARE = CASES["qwen2-square"]
WIDE: dict[str, Any] = {**CASES["llama-yarn"], "hidden_size": 64, "head_dim": 16}


def test_the_golden_file_has_every_case() -> None:
    assert list(RECORDED) == list(CASES)
    assert {name.split("-")[0] for name in CASES} >= {
        *("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "phi3"),
        *("qwen2", "qwen3", "smollm3"),
    }


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_that_llama_cpp_computed(name: str, tmp_path: Path) -> None:
    """From the same bytes: the file that is written now is the one that llama.cpp was given."""
    config = CASES[name]
    directory = write_model(tmp_path / "model", config)
    tensors = weights(config)
    write_gguf(tmp_path / "model.gguf", config, tensors.__getitem__, "f32", {})
    assert digest(tmp_path / "model.gguf") == RECORDED[name]["sha256"]
    ours = kept(lt.logits(lt.load_model(directory), None, ids_of(config)))
    assert relative(ours, torch.tensor(RECORDED[name]["logits"])) <= tolerance(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    config = CASES[name]
    directory = write_model(tmp_path / "model", config)
    tensors = weights(config)
    write_gguf(tmp_path / "model.gguf", config, tensors.__getitem__, "f32", {})
    ours = lt.logits(lt.load_model(directory), None, ids_of(config))
    theirs = llama_cpp_logits(tmp_path / "model.gguf", ids_of(config))
    assert relative(ours, theirs) <= tolerance(name)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [("f16", 2**-9), ("bf16", 2**-6), ("q8_0", 2**-5)])
def test_llama_cpp_reads_every_dtype(dtype: str, bound: float, tmp_path: Path) -> None:
    """Logits move by about the rounding of a weight: 2^-11, 2^-8 and 1/254 of the largest."""
    tensors = weights(WIDE)
    full = llama_cpp_logits(written(tmp_path, WIDE, "f32"), ids_of(WIDE))
    short = llama_cpp_logits(written(tmp_path, WIDE, dtype), ids_of(WIDE))
    assert 0 < relative(short, full) <= bound
    assert tensors


def written(directory: Path, config: dict[str, Any], dtype: str) -> Path:
    path = directory / f"{dtype}.gguf"
    tensors = weights(config)
    result = write_gguf(path, config, tensors.__getitem__, dtype, {})
    assert result.nbytes == path.stat().st_size
    return path


@pytest.mark.parametrize("dtype", GGUF_DTYPES)
def test_numbers_are_those_of_the_packages_own_rounding(dtype: str, tmp_path: Path) -> None:
    tensors, places = weights(WIDE), gguf_tensors(WIDE)
    found = {one.name: one for one in gguf.GGUFReader(written(tmp_path, WIDE, dtype)).tensors}
    assert set(found) == {place.name for place in places.values()}
    kinds = set()
    for name, place in places.items():
        stored, truth = found[place.name], tensors[name]
        if place.heads:
            truth = truth[row_order(truth.shape[0], place.heads).argsort()]
        matrix = truth.dim() == 2
        kind = gguf.GGMLQuantizationType[dtype.upper() if matrix else "F32"]
        if kind.name == "Q8_0" and truth.shape[1] % 32:  # 74 columns
            kind = gguf.GGMLQuantizationType.F16
        assert stored.tensor_type == kind
        expected = dequantize(quantize(truth.numpy(), kind), kind)
        assert np.array_equal(dequantize(stored.data, kind).reshape(truth.shape), expected)
        kinds.add(kind.name)
    assert kinds == {"F32", dtype.upper(), *(["F16"] if dtype == "q8_0" else [])}


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    for dtype, number in GGUF_DTYPES.items():
        name = "ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"
        assert gguf.LlamaFileType[name] == number
    fields = gguf.GGUFReader(written(tmp_path, WIDE, "q8_0")).fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    assert fields["general.architecture"].contents() == "llama"


def test_what_stays_f16_is_told(tmp_path: Path) -> None:
    tensors = weights(WIDE)
    result = write_gguf(tmp_path / "a.gguf", WIDE, tensors.__getitem__, "q8_0", {})
    assert result.kept_f16 == ("blk.0.ffn_down.weight", "blk.1.ffn_down.weight")


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_sixteen_bits_are_read_as_they_are(dtype: str, tmp_path: Path) -> None:
    """From bfloat16 weights: what both can hold is kept to the bit."""
    tensors = {name: one.bfloat16() for name, one in weights(SQUARE).items()}
    write_gguf(tmp_path / "a.gguf", SQUARE, tensors.__getitem__, dtype, {})
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    stored = next(one for one in reader.tensors if one.name == "blk.1.ffn_up.weight")
    expected = tensors["model.layers.1.mlp.up_proj.weight"].float().numpy()
    if dtype == "bf16":
        assert np.array_equal(dequantize(stored.data, stored.tensor_type), expected)
    assert np.abs(dequantize(stored.data, stored.tensor_type) - expected).max() < 2**-24


def test_what_cannot_be_expressed_leaves_nothing(tmp_path: Path) -> None:
    asked: list[str] = []
    with pytest.raises(ModelError, match=r"rope_theta|sliding_window = 5"):
        write_gguf(
            tmp_path / "a.gguf",
            {**CASES["mistral-1"], "sliding_window": 5},
            lambda name: asked.append(name) or torch.zeros(1),  # type: ignore[func-returns-value]
            "f16",
            {},
        )
    assert asked == []
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'q4_k'.*choose one of f32, f16, bf16, q8_0"):
        write_gguf(tmp_path / "a.gguf", SQUARE, weights(SQUARE).__getitem__, "q4_k", {})


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("nan"), "f32"), (7e4, "f16"), (float("inf"), "q8_0")]
)
def test_numbers_that_the_dtype_cannot_hold(value: float, dtype: str, tmp_path: Path) -> None:
    """They are met while the file is written: what was there before stays, and nothing else."""
    tensors = weights(SQUARE)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value
    (tmp_path / "a.gguf").write_bytes(b"before")
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_down\.weight holds a number that is not"):
        write_gguf(tmp_path / "a.gguf", SQUARE, tensors.__getitem__, dtype, {})
    assert [one.read_bytes() for one in tmp_path.iterdir()] == [b"before"]


def test_a_tensor_of_another_shape(tmp_path: Path) -> None:
    tensors = {**weights(SQUARE), "model.norm.weight": torch.ones(59)}
    with pytest.raises(ModelError, match=r"output_norm\.weight has shape \[59\].*asks for \[60\]"):
        write_gguf(tmp_path / "a.gguf", SQUARE, tensors.__getitem__, "f32", {})
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write_gguf(tmp_path / "no" / "a.gguf", SQUARE, weights(SQUARE).__getitem__, "f32", {})


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    """numpy's and Python's own memory, while an embedding of 52 MB in F32 is written as Q8_0."""
    config = {**SQUARE, "vocab_size": 204_800, "hidden_size": 64, "head_dim": 16,
              "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    shapes = {name: place.shape for name, place in gguf_tensors(config).items()}

    def zeros(name: str) -> torch.Tensor:
        return torch.zeros(1).expand(shapes[name])

    tracemalloc.start()
    try:
        write_gguf(tmp_path / "a.gguf", config, zeros, "q8_0", {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 24e6  # a tile of 4 MB, its magnitudes, its blocks


@pytest.mark.usefixtures("unpacked_here")
@pytest.mark.parametrize("name", CASES)
def test_our_reader_computes_what_the_directory_does(name: str, tmp_path: Path) -> None:
    config = CASES[name]
    directory = write_model(tmp_path / "model", config)
    tensors = weights(config)
    write_gguf(tmp_path / "model.gguf", config, tensors.__getitem__, "f32", {})
    ours = lt.logits(lt.load_model(tmp_path / "model.gguf"), None, ids_of(config))
    assert relative(ours, lt.logits(lt.load_model(directory), None, ids_of(config))) <= 1e-5


@pytest.mark.usefixtures("unpacked_here")
def test_a_file_has_its_tokenizer(tmp_path: Path) -> None:
    config = {**SQUARE, "vocab_size": 270}
    write_small_tokenizer(tmp_path)
    tensors, metadata = weights(config), tokenizer_metadata(tmp_path, 270)
    write_gguf(tmp_path / "model.gguf", config, tensors.__getitem__, "f16", metadata)
    truth = Tokenizer.load(tmp_path)
    ours = Tokenizer.load(lt.load_model(tmp_path / "model.gguf").directory)
    text = "<|im_start|>é 1\n"
    assert ours.encode(text) == truth.encode(text)
    assert (ours.bos_id, ours.stop_ids) == (truth.bos_id, truth.stop_ids)
    assert ours.chat_template == truth.chat_template


@pytest.mark.usefixtures("unpacked_here")
def test_a_file_without_a_tokenizer_says_so_where_one_is_needed(tmp_path: Path) -> None:
    path = written(tmp_path, SQUARE, "f32")
    model = lt.load_model(path)
    with pytest.raises(ModelError) as caught:
        Tokenizer.load(model.directory)
    assert f"no tokenizer: {path}: the GGUF file holds no tokenizer" in str(caught.value)
    assert "with --tokenizer DIR" in str(caught.value)
