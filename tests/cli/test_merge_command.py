"""`lowtide merge`: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import small
from safetensors.torch import load_file, save_file

FILE = "model.safetensors"


def refused(outcome: small.Outcome, *parts: str, code: int = 2) -> None:
    assert outcome.code == code, outcome
    assert "lowtide: " in outcome.err
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err, f"{part!r} is not in:\n{outcome.err}"


@pytest.fixture(scope="module")
def merged(model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "out"
    done = small.run("merge", "--model", model, "--adapter-path", adapter, "--out", out)
    assert done.code == 0, done.err
    return out


def test_it_says_what_it_did(model: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = small.run("merge", "--model", model, "--adapter-path", adapter, "--out", out,
                     "--dtype", "bfloat16", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert "merging LoRA r=8 on 14 linears into" in done.err
    assert "rounding to bfloat16 changed what the adapter changes by" in done.err
    assert f'next  lowtide generate --model {out} --prompt "..."' in done.err
    document = done.document
    assert document["out"] == str(out)
    assert document["dtypes"] == ["bfloat16"]
    assert document["base_errors"] == {}
    assert len(document["update_errors"]) == 14
    assert all(0 < error < 1 for error in document["update_errors"].values())
    sizes = sum(p.stat().st_size for p in out.iterdir() if p.name not in NOT_COUNTED)
    assert document["written_bytes"] == sizes


NOT_COUNTED = ("config.json", "lowtide_merge.json")


def test_every_command_runs_on_it_as_on_base_and_adapter(
    model: Path, adapter: Path, merged: Path, data: Path
) -> None:
    common = ("eval", "--data", data, "--max-seq-length", 32, "--json")
    ours = small.run(*common, "--model", merged).document
    theirs = small.run(*common, "--model", model, "--adapter-path", adapter).document
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    prompt = ("generate", "--prompt", "The number", "--max-tokens", 20, "--json")
    with_adapter = small.run(*prompt, "--model", model, "--adapter-path", adapter).document
    assert small.run(*prompt, "--model", merged).document == with_adapter
    assert small.run("info", merged).code == 0


def test_a_quantised_base_says_what_it_cost(model: Path, adapter: Path, tmp_path: Path) -> None:
    assert small.run("quantize", model, tmp_path / "int4").code == 0
    done = small.run("merge", "--model", tmp_path / "int4", "--adapter-path", adapter, "--out",
                     tmp_path / "out", "--dtype", "bfloat16")  # fmt: skip
    assert done.code == 0, done.err
    assert "the base is quantised: what that cost, up to" in done.out
    assert "was trained on other weights than those of" in done.err


def test_checking(model: Path, adapter: Path, merged: Path, tmp_path: Path) -> None:
    given = ("--model", model, "--adapter-path", adapter, "--check")
    done = small.run("merge", *given, "--out", merged, "--json")
    assert done.code == 0, done.err
    assert done.document["equal"] is True
    assert done.document["problems"] == []
    assert done.document["worst_units"] <= 0.5
    assert len(done.document["tensors"]) == 20
    assert "14 tensors have the adapter on them, 6 do not" in done.err
    copy = Path(shutil.copytree(merged, tmp_path / "copy"))
    tensors = load_file(copy / FILE)
    tensors["model.norm.weight"][3] = 5.0
    save_file(tensors, copy / FILE)
    done = small.run("merge", *given, "--out", copy)
    assert done.code == 1
    assert "is not" in done.out
    assert "model.norm.weight: 1 elements are not the base, which it should be" in done.out
    refused(small.run("merge", *given, "--out", tmp_path / "nowhere"), "does not exist")
    refused(small.run("merge", *given, "--out", merged, "--overwrite"), "--check writes nothing")
    refused(small.run("merge", *given, "--out", merged, "--dtype", "float16"), "--check writes no")


def test_mistakes_are_told(
    model: Path, adapter: Path, merged: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = ("--model", model, "--adapter-path", adapter)
    refused(small.run("merge"), "--model is required", "--adapter-path is required", "--out is")
    refused(small.run("merge", *given, "--out", merged), "already holds a merged model")
    refused(small.run("merge", *given, "--out", model), "which is read for the merge")
    refused(small.run("merge", *given, "--out", data), "is a file")
    refused(small.run("merge", *given, "--out", out, "--dtype", "int4"), "bfloat16")
    refused(small.run("merge", "--model", merged, "--adapter-path", adapter, "--out", out),
            "has this adapter in it already", "Merged twice, it would count double")  # fmt: skip
    refused(small.run("merge", "--model", model, "--adapter-path", tmp_path, "--out", out),
            "has no adapter_config.json")  # fmt: skip
    assert list(tmp_path.iterdir()) == []
    done = small.run("merge", *given, "--out", merged, "--overwrite")
    assert done.code == 0, done.err
    answer = small.run("merge", *given, "--out", merged, "--json")
    assert json.loads(answer.out)["kind"] == "OutputError"


def test_a_file_that_may_not_grow(model: Path, adapter: Path, tmp_path: Path) -> None:
    done = small.run_process(
        "merge", "--model", model, "--adapter-path", adapter, "--out", tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    refused(done, "cannot be written: File too large. Free some space")
    assert list(tmp_path.iterdir()) == []
