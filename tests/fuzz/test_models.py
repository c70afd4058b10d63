"""config.json, weights, quantised models and adapters that are not what they say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from judging import QUICK, Judge, fuzz
from mutate import documents, texts
from safetensors.torch import load_file, save_file
from safetensors_files import Parts, files
from small import CONFIG, write_small_model

import lowtide as lt
from lowtide.model.families import FAMILIES, read_config, spec_from_config
from lowtide.model.quantized import quantize_model, verify_model
from lowtide.model.words import in_words
from lowtide.weights.manifest import MANIFEST_FILE, PARTIAL_FILE
from lowtide.weights.quantize import JOURNAL_FILE

GOOD = [
    *(dict(example) for family in FAMILIES.values() for example in family.examples),
    {**CONFIG, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32}},
    {**CONFIG, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
]
FIELDS = tuple(sorted({name for config in GOOD for name in config}))
CONFIGS = st.sampled_from(GOOD).flatmap(lambda config: texts(config, FIELDS))


def _config(raw: bytes, judge: Judge, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(raw)

    def read() -> None:
        spec = spec_from_config(read_config(tmp_path))
        assert spec.n_parameters > 0
        assert all(text for _, text in in_words(spec))

    judge(read)


test_configs, test_many_configs = fuzz(_config, CONFIGS, QUICK * 4, 30_000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model, its config without the tokenizer's files."""
    directory = write_small_model(tmp_path_factory.mktemp("good"))
    return directory


@pytest.fixture
def scratch(tmp_path: Path, model: Path) -> Path:
    """A copy, in which one file will be replaced."""
    shutil.copytree(model, tmp_path / "model")
    return tmp_path / "model"


def _use(directory: Path) -> None:
    """Open it and compute: whatever is accepted must be usable."""
    decoder = lt.load_model(directory)
    found = lt.logits(decoder, None, [1, 2, 3])
    assert found.shape == (3, decoder.spec.vocab_size)


def _weights(data: st.DataObject, judge: Judge, scratch: Path, model: Path) -> None:
    good = Parts(model / "model.safetensors")
    (scratch / "model.safetensors").write_bytes(data.draw(files(good)))
    judge(lambda: _use(scratch))


test_weights, test_many_weights = fuzz(_weights, st.data(), QUICK, 8_000)


SHARDS = ("a.safetensors", "b.safetensors")


@pytest.fixture
def sharded(scratch: Path) -> Path:
    """The model in two files."""
    tensors = load_file(scratch / "model.safetensors")
    for number, name in enumerate(SHARDS):
        kept = {key: tensors[key] for key in sorted(tensors)[number::2]}
        save_file(kept, scratch / name)
    (scratch / "model.safetensors").unlink()
    return scratch


def _index(data: st.DataObject, judge: Judge, sharded: Path) -> None:
    """A file that says where each tensor lies; what it says beside that is nobody's business."""
    names = sorted(spec_from_config(read_config(sharded)).tensor_shapes())
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: SHARDS[number % 2] for number, name in enumerate(names)},
    }
    if data.draw(st.booleans()):
        index["metadata"] = data.draw(documents(index["metadata"]))
        raw = json.dumps(index).encode("utf-8", "surrogatepass")
    else:
        raw = data.draw(texts(index, ("weight_map",)))
    (sharded / "model.safetensors.index.json").write_bytes(raw)
    judge(lambda: _use(sharded))


test_indexes, test_many_indexes = fuzz(_index, st.data(), QUICK, 6_000)


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "int8"
    quantize_model(str(model), out, "int8")
    return out


def _quantized(data: st.DataObject, judge: Judge, tmp_path: Path, quantized: Path) -> None:
    """The manifest or the weights; what was written stays checked against the other."""
    name = data.draw(st.sampled_from((MANIFEST_FILE, "model.safetensors", "config.json")))
    for path in quantized.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    if name == "model.safetensors":
        (tmp_path / name).write_bytes(data.draw(files(Parts(quantized / name))))
    else:
        (tmp_path / name).write_bytes(data.draw(texts(json.loads((quantized / name).read_text()))))
    judge(lambda: _use(tmp_path))
    judge(lambda: verify_model(tmp_path))


test_quantised_models, test_many_quantised_models = fuzz(_quantized, st.data(), QUICK // 2, 2_000)


def _unfinished(
    data: st.DataObject, judge: Judge, tmp_path: Path, model: Path, quantized: Path
) -> None:
    """A journal of work that was stopped: whatever it says, the same weights come out."""
    for path in tmp_path.iterdir():
        path.unlink()
    quantize_model(str(model), tmp_path, "int8")
    whole = (quantized / "model.safetensors").read_bytes()
    assert (tmp_path / "model.safetensors").read_bytes() == whole
    lines = [
        {"storage": "int8", "source": [["model.safetensors", "x"]], "header": "x"},
        {"name": "model.norm.weight", "sha256": {"model.norm.weight": "x"}},
    ]
    (tmp_path / MANIFEST_FILE).unlink()
    (tmp_path / "model.safetensors").rename(tmp_path / PARTIAL_FILE)
    changed = [data.draw(texts(line)) for line in lines]
    (tmp_path / JOURNAL_FILE).write_bytes(
        b"\n".join(changed) + data.draw(st.sampled_from((b"\n", b"")))
    )
    judge(lambda: quantize_model(str(model), tmp_path, "int8", overwrite=True))
    assert (tmp_path / "model.safetensors").read_bytes() == whole


test_unfinished_models, test_many_unfinished_models = fuzz(_unfinished, st.data(), QUICK // 10, 200)


@pytest.fixture(scope="module")
def adapters(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], tuple[lt.Decoder, dict[str, Any], Parts]]:
    """A model, and a good adapter's two files."""
    decoder = lt.load_model(model)
    directory = tmp_path_factory.mktemp("adapter")
    lt.Adapter.create(decoder, lt.LoraConfig(r=2)).save(directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    parts = Parts(directory / "adapter_model.safetensors")
    return lambda: (decoder, config, parts)


KNOWN = (
    *("r", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform"),
    *("target_modules", "modules_to_save", "bias", "init_lora_weights", "layers_pattern"),
)


def _adapter(data: st.DataObject, judge: Judge, tmp_path: Path, adapters: Any) -> None:
    decoder, config, parts = adapters()
    which = data.draw(st.sampled_from(("config", "config", "weights")))
    raw = json.dumps(config).encode() if which == "weights" else data.draw(texts(config, KNOWN))
    (tmp_path / "adapter_config.json").write_bytes(raw)
    weights = data.draw(files(parts)) if which == "weights" else None
    if weights is None:
        header = json.dumps(parts.header).encode()
        weights = len(header).to_bytes(8, "little") + header + parts.data
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)

    def use() -> None:
        adapter = lt.Adapter.load(tmp_path, decoder)
        assert torch.isfinite(lt.logits(decoder, adapter, [1, 2, 3])).all()

    judge(use)


test_adapters, test_many_adapters = fuzz(_adapter, st.data(), QUICK * 2, 8_000)
