"""config.json, weights, quantised models and adapters that are not what they say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from judging import QUICK, Judge, inputs
from mutate import texts
from safetensors_files import Parts, files
from small import CONFIG, write_small_model

import lowtide as lt
from lowtide.model.families import FAMILIES, read_config, spec_from_config
from lowtide.model.quantized import quantize_model, verify_model
from lowtide.model.words import in_words
from lowtide.weights.checkpoint import Checkpoint
from lowtide.weights.manifest import MANIFEST_FILE, PARTIAL_FILE
from lowtide.weights.quantize import JOURNAL_FILE

GOOD = [
    *(dict(example) for family in FAMILIES.values() for example in family.examples),
    {**CONFIG, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32}},
    {**CONFIG, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
]
FIELDS = tuple(sorted({name for config in GOOD for name in config}))
CONFIGS = st.sampled_from(GOOD).flatmap(lambda config: texts(config, FIELDS))


def _config(raw: bytes, judge: Judge, directory: Path) -> None:
    (directory / "config.json").write_bytes(raw)

    def read() -> None:
        spec = spec_from_config(read_config(directory))
        assert spec.n_parameters > 0
        assert all(text for _, text in in_words(spec))

    judge(read)


@given(raw=CONFIGS)
@inputs(QUICK * 4)
def test_configs(raw: bytes, judge: Judge, tmp_path: Path) -> None:
    _config(raw, judge, tmp_path)


@pytest.mark.slow
@given(raw=CONFIGS)
@inputs(30_000)
def test_many_configs(raw: bytes, judge: Judge, tmp_path: Path) -> None:
    _config(raw, judge, tmp_path)


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


def _weights(data: st.DataObject, judge: Judge, scratch: Path, good: Parts) -> None:
    (scratch / "model.safetensors").write_bytes(data.draw(files(good)))
    judge(lambda: _use(scratch))


@given(data=st.data())
@inputs(QUICK)
def test_weights(data: st.DataObject, judge: Judge, scratch: Path, model: Path) -> None:
    _weights(data, judge, scratch, Parts(model / "model.safetensors"))


@pytest.mark.slow
@given(data=st.data())
@inputs(8_000)
def test_many_weights(data: st.DataObject, judge: Judge, scratch: Path, model: Path) -> None:
    _weights(data, judge, scratch, Parts(model / "model.safetensors"))


INDEX = {"metadata": {"total_size": 1}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}


def _index(raw: bytes, judge: Judge, scratch: Path) -> None:
    (scratch / "model.safetensors.index.json").write_bytes(raw)
    judge(lambda: Checkpoint.open(scratch))


@given(raw=texts(INDEX, ("weight_map",)))
@inputs(QUICK)
def test_indexes(raw: bytes, judge: Judge, scratch: Path) -> None:
    _index(raw, judge, scratch)


@pytest.mark.slow
@given(raw=texts(INDEX, ("weight_map",)))
@inputs(6_000)
def test_many_indexes(raw: bytes, judge: Judge, scratch: Path) -> None:
    _index(raw, judge, scratch)


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "int8"
    quantize_model(str(model), out, "int8")
    return out


def _quantized(data: st.DataObject, judge: Judge, out: Path, good: Path) -> None:
    """The manifest or the weights; what was written stays checked against the other."""
    name = data.draw(st.sampled_from((MANIFEST_FILE, "model.safetensors", "config.json")))
    for path in good.iterdir():
        shutil.copyfile(path, out / path.name)
    if name == "model.safetensors":
        (out / name).write_bytes(data.draw(files(Parts(good / name))))
    else:
        (out / name).write_bytes(data.draw(texts(json.loads((good / name).read_text()))))
    judge(lambda: _use(out))
    judge(lambda: verify_model(out))


@given(data=st.data())
@inputs(QUICK // 2)
def test_quantised_models(
    data: st.DataObject, judge: Judge, tmp_path: Path, quantized: Path
) -> None:
    _quantized(data, judge, tmp_path, quantized)


@pytest.mark.slow
@given(data=st.data())
@inputs(2_000)
def test_many_quantised_models(
    data: st.DataObject, judge: Judge, tmp_path: Path, quantized: Path
) -> None:
    _quantized(data, judge, tmp_path, quantized)


def _unfinished(data: st.DataObject, judge: Judge, out: Path, model: Path, good: Path) -> None:
    """A journal of work that was stopped: whatever it says, the same weights come out."""
    for path in out.iterdir():
        path.unlink()
    quantize_model(str(model), out, "int8")
    whole = (good / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == whole
    lines = [
        {"storage": "int8", "source": [["model.safetensors", "x"]], "header": "x"},
        {"name": "model.norm.weight", "sha256": {"model.norm.weight": "x"}},
    ]
    (out / MANIFEST_FILE).unlink()
    (out / "model.safetensors").rename(out / PARTIAL_FILE)
    changed = [data.draw(texts(line)) for line in lines]
    (out / JOURNAL_FILE).write_bytes(b"\n".join(changed) + data.draw(st.sampled_from((b"\n", b""))))
    judge(lambda: quantize_model(str(model), out, "int8", overwrite=True))
    assert (out / "model.safetensors").read_bytes() == whole


@given(data=st.data())
@inputs(QUICK // 10)
def test_unfinished_models(
    data: st.DataObject, judge: Judge, tmp_path: Path, model: Path, quantized: Path
) -> None:
    _unfinished(data, judge, tmp_path, model, quantized)


@pytest.mark.slow
@given(data=st.data())
@inputs(200)
def test_many_unfinished_models(
    data: st.DataObject, judge: Judge, tmp_path: Path, model: Path, quantized: Path
) -> None:
    _unfinished(data, judge, tmp_path, model, quantized)


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


def _adapter(data: st.DataObject, judge: Judge, directory: Path, made: Any) -> None:
    decoder, config, parts = made()
    which = data.draw(st.sampled_from(("config", "config", "weights")))
    raw = json.dumps(config).encode() if which == "weights" else data.draw(texts(config, KNOWN))
    (directory / "adapter_config.json").write_bytes(raw)
    weights = data.draw(files(parts)) if which == "weights" else None
    if weights is None:
        header = json.dumps(parts.header).encode()
        weights = len(header).to_bytes(8, "little") + header + parts.data
    (directory / "adapter_model.safetensors").write_bytes(weights)

    def use() -> None:
        adapter = lt.Adapter.load(directory, decoder)
        assert torch.isfinite(lt.logits(decoder, adapter, [1, 2, 3])).all()

    judge(use)


@given(data=st.data())
@inputs(QUICK * 2)
def test_adapters(data: st.DataObject, judge: Judge, tmp_path: Path, adapters: Any) -> None:
    _adapter(data, judge, tmp_path, adapters)


@pytest.mark.slow
@given(data=st.data())
@inputs(8_000)
def test_many_adapters(data: st.DataObject, judge: Judge, tmp_path: Path, adapters: Any) -> None:
    _adapter(data, judge, tmp_path, adapters)
