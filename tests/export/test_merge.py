"""A merged model is base + adapter, rounded once: held to PEFT's merge in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from helpers import EPS32, SHAPES, asset, hf_logits, relative, write_model
from merging import write_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowtide as lt
from lowtide.check.conformance import Example
from lowtide.errors import AdapterError, ConfigError, LowtideWarning, ModelError, OutputError
from lowtide.export import merged as merged_module
from lowtide.export import model_directory
from lowtide.export.compare import spacing
from lowtide.export.merge import merge
from lowtide.export.merge_record import MERGE_FILE, MergeRecord
from lowtide.model.families import FAMILIES
from lowtide.model.quantized import quantize_model
from lowtide.weights.storages import STORAGES

FILE = "model.safetensors"
NAME = "llama-biases-llama3"
Q = "model.layers.1.self_attn.q_proj.weight"
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "some": {"target_modules": "q_proj,down_proj", "layers_to_transform": [1]},
    "patterns": {
        "use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 3.7},
    },
    "dora": {"use_dora": True},
}  # fmt: skip


def pefts_merge(model: Path, adapter: Path) -> dict[str, Tensor]:
    """The merged tensors in float64, by PEFT."""
    import transformers
    from peft import PeftModel

    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    found = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    return {name: tensor for name, tensor in found.items() if name != "lm_head.weight"}


def adapted_logits(model: Path, adapter: Path | None, ids: list[int]) -> Tensor:
    decoder = lt.load_model(model, "float64")
    return lt.logits(decoder, lt.Adapter.load(adapter, decoder) if adapter else None, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_pefts_sum_rounded_once(
    kind: str, dtype: torch.dtype, odd_model: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(merged_module, "_TILE_ELEMENTS", 400)  # several tiles, the last one short
    model = odd_model(NAME, dtype)
    adapter = write_adapter(model, tmp_path / "adapter", **KINDS[kind])
    merge(model, adapter, tmp_path / "out")
    before, after = load_file(model / FILE), load_file(tmp_path / "out" / FILE)
    truth = pefts_merge(model, adapter)
    assert list(after) == list(before)
    changed = 0
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        exact = truth[name]
        # float64 becomes a 16-bit number by way of float32: half a spacing of each.
        worst = (tensor.double() - exact).abs() / spacing(exact.abs(), dtype)
        assert float(worst.max()) <= 0.5 + EPS32 / 2 / torch.finfo(dtype).eps + 1e-9, name
        changed += not tensor.equal(before[name])
        if f"{name}".endswith(("norm.weight", ".bias", "embed_tokens.weight")):
            assert tensor.equal(before[name])
    assert changed == (2 if kind == "some" else 14)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_base_and_adapter_from_it(family: str, tmp_path: Path) -> None:
    """Of every family, fused projections among them; float32 weights leave 6e-8 of each."""
    config = FAMILIES[family].examples[0]
    example = Example.write(tmp_path / "model", config)
    adapter = write_adapter(example.directory, tmp_path / "adapter", use_dora=True)
    merge(example.directory, adapter, tmp_path / "out")
    found = Example(tmp_path / "out", config).hf_model(torch.float64)
    ids = list(range(3, 40))
    theirs = hf_logits(found, ids)
    assert relative(theirs, adapted_logits(example.directory, adapter, ids)) < 1e-6
    assert relative(theirs, adapted_logits(example.directory, None, ids)) > 1e-2


def test_another_dtype(odd_model: Callable[..., Path], tmp_path: Path) -> None:
    import transformers

    model = odd_model(NAME)
    adapter = write_adapter(model, tmp_path / "adapter")
    truth = pefts_merge(model, adapter)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        report = merge(model, adapter, tmp_path / name, dtype=name)
        held = load_file(tmp_path / name / FILE)
        assert all(held[key].equal(exact.to(dtype)) for key, exact in truth.items())
        assert report.dtypes == [name]
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
        assert loaded.dtype == dtype
        base = load_file(model / FILE)
        for key, error in report.update_errors.items():
            update = truth[key] - base[key].double()
            assert error == pytest.approx(
                float((held[key].double() - truth[key]).norm() / update.norm()), rel=1e-9
            )


def test_shards_stay_as_they_are(tmp_path: Path) -> None:
    import transformers

    model = write_model(tmp_path / "model", SHAPES[NAME], max_shard_size="40KB")
    index = "model.safetensors.index.json"
    before = json.loads((model / index).read_text())
    adapter = write_adapter(model, tmp_path / "adapter")
    report = merge(model, adapter, tmp_path / "out")
    after = json.loads((tmp_path / "out" / index).read_text())
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"]
    assert len(set(after["weight_map"].values())) > 2
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert sum(sizes) + (model / "generation_config.json").stat().st_size == report.written_bytes
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = list(range(20))
    assert relative(hf_logits(loaded, ids), adapted_logits(model, adapter, ids)) < 1e-5


@pytest.mark.parametrize("storage", STORAGES)
def test_a_quantised_base(
    storage: str, odd_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its function is that of the dequantised weights; so is the merged model's, and plain."""
    model = odd_model(NAME, torch.bfloat16)
    errors = quantize_model(str(model), tmp_path / "base", storage).relative_rms_errors
    adapter = write_adapter(tmp_path / "base", tmp_path / "adapter")
    ids = list(range(20))
    truth = adapted_logits(tmp_path / "base", adapter, ids)
    monkeypatch.setattr(model_directory, "SHARD_BYTES", 30_000)
    report = merge(tmp_path / "base", adapter, tmp_path / "out", dtype="float32")
    assert report.base_errors == errors
    assert relative(adapted_logits(tmp_path / "out", None, ids), truth) < 1e-6
    assert len(list((tmp_path / "out").glob("model-0000*-of-0000*.safetensors"))) > 2
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert merge(tmp_path / "base", adapter, tmp_path / "b").dtypes == ["bfloat16"]
    merge(model, adapter, tmp_path / "cached", dtype="float32", quantize=storage)
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cached" / path.name).read_bytes()


def test_the_other_files_come_along(tmp_path: Path) -> None:
    model = small.write_small_model(tmp_path / "model")
    for name in ("generation_config.json", "chat_template.jinja", "LICENSE", "tokenizer.model"):
        (model / name).write_text(name)
    (model / "notes.md").write_text("the user's own")
    adapter = write_adapter(model, tmp_path / "adapter")
    merge(model, adapter, tmp_path / "deep" / "out")
    held, theirs = small.tree(tmp_path / "deep" / "out"), small.tree(model)
    record = json.loads(held.pop(MERGE_FILE) or b"")
    assert set(held) == set(theirs) - {"notes.md"}
    assert {name for name in held if held[name] != theirs[name]} == {FILE}
    assert set(record["files"]) == {*held, MERGE_FILE}
    (entry,) = record["merges"]
    assert entry["adapter"]["path"] == str(adapter)
    assert entry["adapter"]["config"]["lora_alpha"] == 7.0
    assert entry["base"]["stored_as"] == ["float32"]


def test_a_tied_head_that_is_stored_is_left_out(tmp_path: Path) -> None:
    model = small.write_small_model(tmp_path / "model")
    tensors = load_file(model / FILE)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
              model / FILE)  # fmt: skip
    merge(model, write_adapter(model, tmp_path / "adapter"), tmp_path / "out")
    assert set(load_file(tmp_path / "out" / FILE)) == set(tensors)


def test_merging_twice_is_refused(tmp_path: Path) -> None:
    model = small.write_small_model(tmp_path / "model")
    adapter = write_adapter(model, tmp_path / "adapter")
    merge(model, adapter, tmp_path / "out")
    quantize_model(str(tmp_path / "out"), tmp_path / "int8", "int8")
    for base in (tmp_path / "out", tmp_path / "int8"):
        with pytest.raises(ModelError, match="has this adapter in it already: it was merged on 20"):
            merge(base, adapter, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    second = write_adapter(tmp_path / "out", tmp_path / "second", target_modules="v_proj")
    merge(tmp_path / "out", second, tmp_path / "both")
    record = MergeRecord.read(tmp_path / "both")
    assert [Path(one.adapter["path"]).name for one in record.merges] == ["adapter", "second"]
    with pytest.raises(ModelError, match="has this adapter in it already"):
        merge(tmp_path / "both", adapter, tmp_path / "thrice")


def test_what_cannot_be_merged_is_told(odd_model: Callable[..., Path], tmp_path: Path) -> None:
    model = small.write_small_model(tmp_path / "model")
    adapter = write_adapter(model, tmp_path / "adapter", r=2)
    out = tmp_path / "out"
    with pytest.raises(AdapterError, match=r"q_proj.lora_A.weight is \[2, 32\], the model needs"):
        merge(odd_model(NAME), adapter, out)
    for place, said in {
        model: "is, or holds,", tmp_path: "is, or holds,", adapter: "is, or holds,",
        adapter / "adapter_config.json": "is a file",
    }.items():  # fmt: skip
        with pytest.raises(OutputError, match=said):
            merge(model, adapter, place, overwrite=True)
    out.mkdir()
    (out / "thesis.txt").write_text("")
    with pytest.raises(OutputError, match=r"did not write \(thesis.txt\)"):
        merge(model, adapter, out, overwrite=True)
    assert small.tree(out) == {"thesis.txt": b""}
    merge(model, adapter, tmp_path / "merged")
    with pytest.raises(OutputError, match=r"already holds a merged model.*--overwrite, or compare"):
        merge(model, adapter, tmp_path / "merged")
    (tmp_path / "merged" / "thesis.txt").write_text("")
    with pytest.raises(OutputError, match="did not write"):
        merge(model, adapter, tmp_path / "merged", overwrite=True)
    (tmp_path / "merged" / MERGE_FILE).write_text("{")
    with pytest.raises(ModelError, match="says of merges cannot be used"):
        merge(tmp_path / "merged", adapter, tmp_path / "again")


def test_numbers_that_are_none(tmp_path: Path) -> None:
    model = small.write_small_model(tmp_path / "model")
    adapter = write_adapter(model, tmp_path / "adapter")
    tensors = load_file(model / FILE)
    big = {**tensors, Q: tensors[Q].index_fill(0, torch.tensor([3]), 7e4)}
    save_file({**big, "model.norm.weight": torch.full((32,), 1e5)}, model / FILE)
    with pytest.raises(ConfigError, match=r"(?s)float16 cannot hold.*Give --dtype bf") as refusal:
        merge(model, adapter, tmp_path / "out", dtype="float16")
    assert "model.norm.weight" in str(refusal.value)
    assert Q in str(refusal.value)
    merge(model, adapter, tmp_path / "fits", dtype="bfloat16")
    save_file({**tensors, Q: tensors[Q].index_fill(0, torch.tensor([3]), torch.inf)}, model / FILE)
    with pytest.raises(ModelError, match=f"(?s)are not finite numbers.*{Q}"):
        merge(model, adapter, tmp_path / "out")
    matrices = load_file(adapter / "adapter_model.safetensors")
    save_file({n: t.fill_(torch.nan) for n, t in matrices.items()},
              adapter / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(AdapterError, match="holds values that are not finite numbers: base_model"):
        merge(model, adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "fits", "model"]


def test_an_adapter_that_changes_nothing_is_told(tmp_path: Path) -> None:
    model = small.write_small_model(tmp_path / "model")
    lt.Adapter.create(lt.load_model(model)).save(tmp_path / "fresh")
    with pytest.warns(LowtideWarning, match="changes nothing"):
        merge(model, tmp_path / "fresh", tmp_path / "out")
    assert (tmp_path / "out" / FILE).read_bytes() == (model / FILE).read_bytes()


def test_no_room_is_known_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small.write_small_model(tmp_path / "model")
    adapter = write_adapter(model, tmp_path / "adapter")
    usage = type("Usage", (), {"total": 10**9, "free": 10**6})
    monkeypatch.setattr("lowtide.weights.whole.shutil.disk_usage", lambda place: usage)
    with pytest.raises(OutputError, match=r"has 1.0 MB free, and the result needs 1.1 MB"):
        merge(model, adapter, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_eval_of_the_merged_model_is_that_of_base_and_adapter(tmp_path: Path) -> None:
    """A real model: float32 to rounding; bfloat16 as its own rounded weights have it."""
    model = asset("models/stories260K/hf-llama")
    stories = asset("data/tinystories_sample/tinystories_sample.txt")
    adapter = write_adapter(model, tmp_path / "adapter", lora_alpha=3.0)

    def loss(directory: Path, *more: object) -> float:
        done = small.run("eval", "--model", directory, "--data", stories, "--max-seq-length", 128,
                         "--json", *more)  # fmt: skip
        assert done.code == 0, done.err
        return float(done.document["loss"])

    truth = loss(model, "--adapter-path", adapter)
    assert abs(truth - loss(model)) > 0.01
    merge(model, adapter, tmp_path / "float32")
    assert loss(tmp_path / "float32") == pytest.approx(truth, rel=2e-6)
    merge(model, adapter, tmp_path / "bfloat16", dtype="bfloat16")
    # 260,000 roundings of at most 2^-9 each, independent of one another and of the loss.
    assert loss(tmp_path / "bfloat16") == pytest.approx(truth, rel=2**-9)
