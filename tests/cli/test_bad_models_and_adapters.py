"""Broken model directories and adapters: refused by name by every command that opens them."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from safetensors.torch import load_file, save_file

import lowtide as lt
from lowtide.errors import AdapterError, ModelError

WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def refused(outcome: small.Outcome, *parts: str, code: int = 2) -> None:
    """The command ended with `code` and said all of this, without a traceback."""
    assert outcome.code == code, outcome
    assert outcome.err.startswith("lowtide: ")
    for part in parts:
        assert part in outcome.err, f"{part!r} is not in:\n{outcome.err}"


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A model directory to break."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


@pytest.fixture
def adapter_copy(adapter: Path, tmp_path: Path) -> Path:
    """An adapter directory to break."""
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def edit_config(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a safetensors header and leave its data as it is."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_a_directory_without_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    refused(small.run("info", copy), "has no config.json", "tokenizer.json and *.safetensors")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds list, not an object"),
        ("[" * 100_000, "is not valid JSON"),
        ("\ud800", "is not valid JSON"),
    ],
)
def test_a_config_that_is_not_one(copy: Path, content: str, part: str) -> None:
    (copy / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    refused(small.run("info", copy), part, "Download it again")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "mamba"}, ["model_type 'mamba' is not supported", "llama, mistral, olmo2"]),
        ({"model_type": None}, ["config.json has no model_type", "Download it again"]),
        ({"model_type": ["llama"]}, ["model_type ['llama'] is not supported"]),
        ({"hidden_act": "gelu"}, ["hidden_act = 'gelu' (supported: silu)"]),
        ({"num_attention_heads": 3}, ["not a multiple of num_key_value_heads", "hidden_size = 32"]),
        ({"hidden_size": None}, ["hidden_size is missing"]),
        ({"hidden_size": -32}, ["hidden_size = -32 (expected a positive number)"]),
        ({"hidden_size": "32"}, ["hidden_size = '32'"]),
        ({"num_hidden_layers": 2.5}, ["num_hidden_layers = 2.5 (expected an integer)"]),
        ({"num_hidden_layers": 10**12}, ["num_hidden_layers = 1000000000000 is not sensible"]),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 2}}, ["rope type 'mrope'", "linear"]),
        ({"rope_scaling": {"rope_type": ["linear"]}}, ["rope type ['linear']"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor is missing"]),
        ({"rope_scaling": 3}, ["rope_scaling = 3 (expected an object)"]),
        ({"rope_theta": -1}, ["rope_theta = -1"]),
        ({"layer_types": [{"a": 1}]}, ["layer_types = [{'a': 1}]", "full_attention"]),
        ({"logit_scale": 2.0}, ["logit_scale = 2.0 is not a field that lowtide knows"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "give unquantised weights"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings = 'yes' (expected true or false)"]),
        (
            {"model_type": "qwen2", "use_mrope": True, "sliding_window": 2.5},
            ["use_mrope = True", "sliding_window = 2.5"],
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "all"},
            ["max_window_layers = 'all' (expected an integer from 0)"],
        ),
        (
            {"hidden_act": "gelu", "attention_dropout": 0.1, "attention_bias": 1},
            ["hidden_act", "attention_dropout = 0.1", "attention_bias = 1"],
        ),
    ],
)
def test_a_config_that_asks_for_something_else(
    copy: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    edit_config(copy / "config.json", **changes)
    refused(small.run("info", copy), *parts)


def test_weights_that_cannot_be_read(copy: Path) -> None:
    path = copy / WEIGHTS
    good = path.read_bytes()
    first_offsets = {"data_offsets": [0, 10**9]}
    name = "model.embed_tokens.weight"
    breaks: list[Callable[[], object]] = [
        lambda: cut(path),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(b"not a safetensors file"),
        lambda: path.write_bytes(struct.pack("<Q", 2**62) + good[8:]),
        lambda: path.write_bytes(struct.pack("<Q", 40) + good[8:]),
        lambda: path.write_bytes(good + b"more"),
        lambda: edit_header(path, lambda h: h[name].update(first_offsets)),
        lambda: edit_header(path, lambda h: h[name].update(shape=[1000, 1000])),
        lambda: edit_header(path, lambda h: h[name].update(shape=[-1, 32])),
        lambda: edit_header(path, lambda h: h[name].update(dtype="F99")),
    ]
    for number, damage in enumerate(breaks):
        path.write_bytes(good)
        damage()
        outcome = small.run("info", copy)
        assert outcome.code == 2, number
        refused(outcome, WEIGHTS, "cannot be read", "truncated or corrupt; download it again")


def test_tensors_that_do_not_fit_are_all_listed(copy: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2, 2)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = torch.ones(31)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(40, 32, dtype=torch.int8)

    edit_tensors(copy / WEIGHTS, change)
    parts = [
        "do not fit its config.json",
        "missing: model.layers.1.mlp.up_proj.weight [40, 32]",
        "extra: model.layers.2.mlp.up_proj.weight [2, 2]",
        "wrong shape: model.norm.weight is [31], config.json asks for [32]",
        "dtype int8: model.layers.0.mlp.up_proj.weight",
    ]
    refused(small.run("info", copy), *parts)
    with pytest.raises(ModelError, match=r"do not fit its config\.json"):
        lt.load_model(copy)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_how_to_convert(copy: Path, name: str) -> None:
    (copy / WEIGHTS).rename(copy / name)
    refused(small.run("info", copy), name, "run code", "safe_serialization=True")


def test_no_weights_and_missing_or_strange_shards(copy: Path) -> None:
    weights, index = copy / WEIGHTS, copy / (WEIGHTS + ".index.json")
    names = list(load_file(weights))
    weights.rename(copy / "other.safetensors")
    refused(small.run("info", copy), "has no model.safetensors", "found only other.safetensors")
    (copy / WEIGHTS).mkdir()
    refused(small.run("info", copy), "has no model.safetensors")
    index.write_text(json.dumps({"weight_map": {name: "a.safetensors" for name in names}}))
    refused(small.run("info", copy), "lacks 1 of 1 weight files", "a.safetensors")
    index.write_text(json.dumps({"weight_map": {names[0]: "../other.safetensors"}}))
    refused(small.run("info", copy), "names files outside its directory")
    index.write_text('{"weight_map": [1]}')
    refused(small.run("info", copy), "is not a safetensors index")
    promised = {name: "other.safetensors" for name in [*names, "model.extra.weight"]}
    index.write_text(json.dumps({"weight_map": promised}))
    refused(small.run("info", copy), "promises tensors", "model.extra.weight")


def test_a_directory_without_a_tokenizer(copy: Path, data: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.model").write_bytes(b"x")
    before = small.tree(tmp_path)
    train = ("train", "--data", data, "--adapter-path", tmp_path / "out", "--max-seq-length", 32)
    evaluate = ("eval", "--data", data, "--max-seq-length", 32)
    for command in (train, evaluate, ("generate",)):
        refused(
            small.run(*command, "--model", copy),
            "holds tokenizer.model but no tokenizer.json",
            "--tokenizer",
        )
    (copy / "tokenizer.json").write_text("{}")
    refused(small.run("generate", "--model", copy), "is not a tokenizer that can be read")
    (copy / "tokenizer.json").unlink()
    assert small.tree(tmp_path) == before


def test_a_tokenizer_of_another_model(data: Path, tmp_path: Path) -> None:
    wee = small.write_small_model(tmp_path / "wee", vocab_size=80)
    train = ("train", "--data", data, "--adapter-path", tmp_path / "out", "--max-seq-length", 32)
    for command in (train, ("eval", "--data", data, "--max-seq-length", 32)):
        refused(
            small.run(*command, "--model", wee),
            "line 1: tokenizer and model do not match",
            "the model has 80 tokens",
        )
    assert not (tmp_path / "out").exists()
    refused(
        small.run("generate", "--model", wee, "--prompt", "zzz"),
        "outside the model's vocabulary of 80",
        "--tokenizer",
    )


def test_a_prompt_longer_than_the_models_positions(model: Path) -> None:
    refused(
        small.run("generate", "--model", model, "--prompt", "word " * 30),
        "tokens, and the model has positions for 64",
    )


def test_a_hub_model_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    refused(
        small.run("info", "nobody/no-such-model"),
        "there is no directory 'nobody/no-such-model' here",
        "not in the local hub cache",
        "give the path of a local model directory",
    )


def damage_nan(path: Path) -> None:
    edit_tensors(path / ADAPTER, lambda t: t[f"{Q}.lora_B.weight"].fill_(float("nan")))


def damage_shape(path: Path) -> None:
    edit_tensors(path / ADAPTER, lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(8, 33)}))


def damage_names(path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{Q}.lora_A.weight"]
        tensors[f"{Q.replace('.0.', '.9.')}.lora_A.weight"] = torch.zeros(8, 32)

    edit_tensors(path / ADAPTER, change)


def damage_pickle(path: Path) -> None:
    (path / ADAPTER).rename(path / "adapter_model.bin")


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda path: edit_config(path / "adapter_config.json", **changes)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (damage_nan, ["holds values that are not finite numbers", f"{Q}.lora_B.weight"]),
        (damage_shape, ["wrong shape", "is [8, 33], the model needs [8, 32]", "trained on"]),
        (damage_names, ["missing: " + Q, "not in this model: ", "layers.9."]),
        (damage_pickle, ["is pickled", "safe_serialization=True"]),
        (lambda path: cut(path / ADAPTER), ["cannot be read", "truncated or corrupt"]),
        (lambda path: (path / ADAPTER).unlink(), ["has no adapter_model.safetensors"]),
        (lambda path: (path / "adapter_config.json").unlink(), ["has no adapter_config.json"]),
        (lambda path: (path / "adapter_config.json").write_text("{"), ["is not valid JSON"]),
        (lambda path: (path / "adapter_config.json").write_text("[]"), ["holds list"]),
        (config(r=0), ["r is 0"]),
        (config(r="8"), ["r is '8'"]),
        (config(r=4), ["wrong shape", "the model needs [4, 32]"]),
        (config(lora_alpha=float("nan")), ["lora_alpha is nan"]),
        (config(peft_type="LOHA"), ["peft_type = 'LOHA' (supported: 'LORA')"]),
        (config(use_dora=True), ["missing: " + Q, "lora_magnitude_vector"]),
        (config(lora_bias=True), ["lora_bias = True (supported: False)"]),
        (config(target_modules=[{"q": 1}]), ["target_modules = [{'q': 1}]"]),
        (config(target_modules=["c_attn"]), ["target_modules 'c_attn'"]),
        (config(layers_to_transform=[7]), ["layers_to_transform is [7]", "layers 0 to 1"]),
    ],
)
def test_a_broken_adapter(
    model: Path, adapter_copy: Path, damage: Callable[[Path], object], parts: list[str]
) -> None:
    damage(adapter_copy)
    generate = ("generate", "--model", model, "--adapter-path", adapter_copy)
    refused(small.run(*generate, "--max-tokens", 2), str(adapter_copy), *parts)
    with pytest.raises(AdapterError):
        lt.Adapter.load(adapter_copy, lt.load_model(model))


def test_an_adapter_of_another_model(adapter: Path, data: Path, tmp_path: Path) -> None:
    other = small.write_small_model(tmp_path / "other", hidden_size=48, num_hidden_layers=1)
    adapted = ("--model", other, "--adapter-path", adapter)
    for command in (("generate",), ("eval", "--data", data, "--max-seq-length", 32)):
        refused(
            small.run(*command, *adapted),
            "does not fit the model in",
            "is [8, 32], the model needs [8, 48]",
            "not in this model: base_model.model.model.layers.1.",
            "... and ",
            "Give the model that it was trained on",
        )
