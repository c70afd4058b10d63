"""Adapters for llama.cpp: what it computes with them is what lowtide computes.

llama.cpp is the independent truth. What it computed is in golden/llama_cpp_adapters.json (see
gguf_adapters.py); slow tests ask it again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import small
import torch
from gguf_adapters import (
    GOLDEN,
    KINDS,
    adapter_cases,
    exported,
    llama_cpp_greedy,
    llama_cpp_logits,
    llama_cpp_text,
    write_both,
)
from gguf_models import cases, digest, ids_of, kept, relative, tolerance
from helpers import asset
from merging import write_adapter
from safetensors.torch import load_file, save_file

import lowtide as lt
from lowtide.errors import AdapterError, ConfigError, ModelError, OutputError
from lowtide.export import gguf_adapter
from lowtide.export.gguf import export_adapter, export_model
from lowtide.export.merge import merge
from lowtide.model.quantized import quantize_model

CASES = adapter_cases()
RECORDED = json.loads(GOLDEN.read_text(encoding="utf-8"))
PREFIX = "base_model.model.model.layers"


def ours(both: tuple[Path, Path], ids: list[int]) -> torch.Tensor:
    model = lt.load_model(both[0])
    return lt.logits(model, lt.Adapter.load(both[1], model), ids)


def test_every_family_is_recorded() -> None:
    assert list(RECORDED) == list(CASES)
    assert {name.split("-")[0] for name in CASES} == {name.split("-")[0] for name in cases()}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_that_llama_cpp_computed(name: str, tmp_path: Path) -> None:
    """With the same bytes: the file that is written now is the one that llama.cpp was given."""
    config, settings = CASES[name]
    both = write_both(tmp_path, config, settings)
    assert digest(exported(tmp_path, both).path) == RECORDED[name]["sha256"]
    found = kept(ours(both, ids_of(config)))[:, ::2]
    assert relative(found, torch.tensor(RECORDED[name]["logits"])) <= tolerance(name)
    base = kept(lt.logits(lt.load_model(both[0]), None, ids_of(config)))[:, ::2]
    assert relative(base, found) > 10 * tolerance(name), "or the adapter would not matter"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    config, settings = CASES[name]
    both = write_both(tmp_path, config, settings)
    export_model(both[0], tmp_path / "model.gguf", dtype="f32")
    lora = exported(tmp_path, both).path
    theirs = llama_cpp_logits(tmp_path / "model.gguf", ids_of(config), lora)
    assert relative(ours(both, ids_of(config)), theirs) <= tolerance(name)


@pytest.mark.slow
def test_a_real_model_says_the_same_words(tmp_path: Path) -> None:
    """stories260K under an adapter, and merged into a file: greedy text and logits."""
    model = asset("models/stories260K/hf-llama")
    adapter = write_adapter(model, tmp_path / "adapter", lora_alpha=1.5)
    export_model(model, tmp_path / "model.gguf", dtype="f32")
    export_adapter(model, adapter, tmp_path / "lora.gguf")
    merge(model, adapter, tmp_path / "merged.gguf", dtype="float32")
    decoder = lt.load_model(model)
    prompt, count = [1, 403, 407, 261], 60
    expected = list(lt.generate(decoder, lt.Adapter.load(adapter, decoder), prompt, count))
    assert expected != list(lt.generate(decoder, None, prompt, count))
    logits = ours((model, adapter), prompt + expected)
    for path, lora in ((tmp_path / "model.gguf", tmp_path / "lora.gguf"),
                       (tmp_path / "merged.gguf", None)):  # fmt: skip
        assert llama_cpp_greedy(path, prompt, count, lora) == expected
        assert relative(logits, llama_cpp_logits(path, prompt + expected, lora)) < 5e-6
        assert llama_cpp_text(path, "Once upon a time", 40, lora) == _said(model, adapter)


def _said(model: Path, adapter: Path) -> str:
    done = small.run("generate", "--model", model, "--adapter-path", adapter, "--prompt",
                     "Once upon a time", "--max-tokens", 40, "--json")  # fmt: skip
    assert done.code == 0, done.err
    return str(done.document["text"])


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_the_file_holds_a_and_b_in_llama_cpps_order(dtype: str, tmp_path: Path) -> None:
    """Rows of q and k as llama.cpp's converter permutes them; one alpha, the rest in B."""
    config, settings = CASES["llama-yarn-patterns"]
    both = write_both(tmp_path, config, settings)
    written = exported(tmp_path, both, dtype)
    reader = gguf.GGUFReader(written.path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama"
    alpha = fields["adapter.lora.alpha"]
    assert alpha == np.float32(5 * 3**0.5)  # rsLoRA's s r
    found = {one.name: one.data for one in reader.tensors}
    parameters = load_file(both[1] / "adapter_model.safetensors")
    assert len(found) == len(parameters) == 28
    kind = np.float32 if dtype == "f32" else np.float16
    scales = {"attn_output": 5.0 / 5**0.5, "ffn_down": 3.7 / 2**0.5}
    for (short, heads), layer in ((pair, n) for pair in NAMES.items() for n in (0, 1)):
        name = f"{PREFIX}.{layer}.{short}"
        there = f"blk.{layer}.{NAMES_THERE[short]}"
        a, b = (parameters[f"{name}.lora_{part}.weight"].numpy() for part in "AB")
        rank = b.shape[1]
        scale = scales.get(NAMES_THERE[short], 5 / 3**0.5)
        if there == "blk.1.attn_output":
            scale = 2 / 5**0.5
        if heads:  # convert_hf_to_gguf.py, LlamaModel.permute
            n = config[heads]
            b = b.reshape(n, 2, b.shape[0] // n // 2, rank).swapaxes(1, 2).reshape(b.shape)
        assert np.array_equal(found[f"{there}.weight.lora_a"], a.astype(kind))
        effective = found[f"{there}.weight.lora_b"].astype(np.float64) * float(alpha) / rank
        assert np.allclose(effective, scale * b, rtol=2e-7 if dtype == "f32" else 2**-10, atol=1e-7)
    # A scale that is alpha / r leaves B as it is, to the bit.
    assert {name.removesuffix(".weight").split(".")[2] for name in written.scaled} == set(scales)


NAMES = {
    "self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads",
    "self_attn.v_proj": None, "self_attn.o_proj": None, "mlp.gate_proj": None,
    "mlp.up_proj": None, "mlp.down_proj": None,
}  # fmt: skip
NAMES_THERE = dict(
    zip(NAMES, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
        strict=True)
)  # fmt: skip


def test_what_llama_cpp_cannot_take_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small.write_small_model(tmp_path / "model")
    out = tmp_path / "a.gguf"
    dora = write_adapter(model, tmp_path / "dora", use_dora=True)
    with pytest.raises(AdapterError, match=r"is DoRA \(use_dora\).*Write the merged model instead"):
        export_adapter(model, dora, out)
    adapter = write_adapter(model, tmp_path / "adapter")
    other = small.write_small_model(tmp_path / "other", hidden_size=48)
    with pytest.raises(AdapterError, match=r"q_proj.lora_A.weight is \[3, 32\], the model needs"):
        export_adapter(other, adapter, out)
    names = gguf_adapter.gguf_tensors

    def without_gates(config: dict[str, Any]) -> dict[str, Any]:
        return {k: v._replace(name="" if "gate" in k else v.name) for k, v in names(config).items()}

    with monkeypatch.context() as patch:
        patch.setattr(gguf_adapter, "gguf_tensors", without_gates)
        with pytest.raises(AdapterError, match=r"(?s)no tensors for.*mlp.gate_proj in block 1"):
            export_adapter(model, adapter, out)
    tensors = adapter / "adapter_model.safetensors"
    big = {name: t * 1e6 for name, t in load_file(tensors).items()}
    save_file(big, tensors)
    with pytest.raises(ModelError, match=r"lora_a holds a number that is not finite in F16"):
        export_adapter(model, adapter, out, dtype="f16")
    assert not out.exists()
    out.write_text("a poem")
    with pytest.raises(OutputError, match="is no GGUF file"):
        export_adapter(model, adapter, out, overwrite=True)
    with pytest.raises(OutputError, match="is a directory"):
        export_adapter(model, adapter, tmp_path)
    export_adapter(model, adapter, tmp_path / "b.gguf")
    with pytest.raises(OutputError, match="exists already"):
        export_adapter(model, adapter, tmp_path / "b.gguf")
    export_adapter(model, adapter, tmp_path / "b.gguf", overwrite=True)


def test_a_merged_model_in_a_file_is_the_merged_directory_in_a_file(tmp_path: Path) -> None:
    """Merging, then writing, gives the same numbers: in every dtype, for every kind of adapter."""
    config = cases()["llama-yarn"]
    both = write_both(tmp_path, {**config, "hidden_size": 64, "head_dim": 16}, {"use_dora": True})
    merge(*both, tmp_path / "merged", dtype="float32")
    for name, kind in (("float32", "f32"), ("float16", "f16"), ("q8_0", "q8_0")):
        report = merge(*both, tmp_path / f"{kind}.gguf", dtype=name)
        export_model(tmp_path / "merged", tmp_path / "whole.gguf", dtype=kind, overwrite=True)
        one, other = (
            {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
            for path in (tmp_path / f"{kind}.gguf", tmp_path / "whole.gguf")
        )
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)
        assert report.dtypes[0] == kind
        assert report.written_bytes == (tmp_path / f"{kind}.gguf").stat().st_size
    fields = gguf.GGUFReader(tmp_path / "q8_0.gguf").fields
    (entry,) = json.loads(fields["lowtide.merges"].contents())["merges"]
    assert entry["adapter"]["path"] == str(both[1])
    with pytest.raises(ConfigError, match=r"--dtype q8_0 is of GGUF files"):
        merge(*both, tmp_path / "x", dtype="q8_0")
    with pytest.raises(OutputError, match="exists already"):
        merge(*both, tmp_path / "f16.gguf")


def test_what_a_file_holds_where_nobody_says(tmp_path: Path) -> None:
    model = small.write_small_model(tmp_path / "model")
    adapter = write_adapter(model, tmp_path / "adapter")
    quantize_model(str(model), tmp_path / "int8", "int8")
    assert merge(model, adapter, tmp_path / "a.gguf").dtypes == ["f32"]
    report = merge(tmp_path / "int8", adapter, tmp_path / "b.gguf")
    assert report.dtypes == ["f16"]
    assert len(report.base_errors) == 15


def test_kinds_are_all_used() -> None:
    assert {name.rpartition("-")[2] for name in CASES} == set(KINDS)
