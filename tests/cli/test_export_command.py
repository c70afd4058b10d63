"""`lowtide export gguf`, and `lowtide merge` into a GGUF file."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import gguf
import small


def refused(outcome: small.Outcome, *parts: str, code: int = 2) -> None:
    assert outcome.code == code, outcome
    assert "lowtide: " in outcome.err
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err, f"{part!r} is not in:\n{outcome.err}"


def test_an_adapter(model: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    given = ("export", "gguf", "--model", model, "--adapter-path", adapter, "--out", out)
    done = small.run(*given)
    assert done.code == 0, done.err
    assert "LoRA on 14 tensors of an llama model, alpha 16" in done.out
    assert f"next  llama-cli -m MODEL.gguf --lora {out}" in done.out
    done = small.run(*given, "--overwrite", "--dtype", "f16", "--json")
    assert done.document == {
        "path": str(out), "nbytes": out.stat().st_size, "architecture": "llama", "alpha": 16.0,
        "tensors": 14, "scaled": {},
    }  # fmt: skip
    assert len(gguf.GGUFReader(out).tensors) == 28


def test_a_model(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    done = small.run("export", "gguf", "--model", model, "--out", out, "--dtype", "q8_0", "--json")
    assert done.code == 0, done.err
    assert "writing 22,432 parameters as q8_0" in done.err
    assert done.document["nbytes"] == out.stat().st_size
    assert len(done.document["kept_f16"]) == 2, "rows of 40 in down_proj"
    fields = gguf.GGUFReader(out).fields
    assert fields["general.type"].contents() == "model"
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 264


def test_a_merged_model(model: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    done = small.run("merge", "--model", model, "--adapter-path", adapter, "--out", out, "--json")
    assert done.code == 0, done.err
    assert f"next  llama-cli -m {out}" in done.err
    assert done.document["dtypes"] == ["f32"]
    record = gguf.GGUFReader(out).fields["lowtide.merges"].contents()
    (entry,) = json.loads(record)["merges"]
    assert entry["base"]["path"] == str(model)


def test_mistakes_are_told(model: Path, adapter: Path, data: Path, tmp_path: Path) -> None:
    given = ("export", "gguf", "--model", model, "--out", tmp_path / "a.gguf")
    with_adapter = (*given, "--adapter-path", adapter)
    refused(small.run("export", "peft"), "an adapter's directory is PEFT's already")
    refused(small.run("export", "ggml"), "unknown format 'ggml'; did you mean 'gguf'?")
    assert small.run("export", "--help").code == 0
    assert small.run("export").code == 2
    refused(small.run("export", "gguf"), "--model is required", "--out is required")
    refused(small.run(*with_adapter, "--dtype", "q8_0"), "an adapter's matrices are f32 or f16")
    refused(small.run(*given, "--dtype", "q4_k"), "f32, f16, bf16, q8_0")
    refused(small.run("export", "gguf", "--model", model, "--out", data), "is no GGUF file")
    merge = ("merge", "--model", model, "--adapter-path", adapter)
    refused(small.run(*merge, "--out", tmp_path / "m", "--dtype", "q8_0"), "such as m.gguf")
    assert list(tmp_path.iterdir()) == []
    done = small.run_process(
        *given, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    )
    refused(done, "cannot be written: File too large. Free some space")
    assert list(tmp_path.iterdir()) == []
