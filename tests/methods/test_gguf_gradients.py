"""Gradients over GGUF weights are those of the model that has the unpacked weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import TYPES, KindOf, all_in, fitting, plain_model, random_weights, write
from helpers import EPS32, asset, random_adapter, random_batch, relative
from safetensors.torch import load_file

import lowtide as lt
from lowtide.methods import METHODS, MethodOptions
from lowtide.model.decoder import Decoder
from lowtide.model.families import spec_from_config

pytestmark = pytest.mark.usefixtures("unpacked_here")
EXACT = [name for name, make in METHODS.items() if make(MethodOptions()).exact]
# Blocks of 256 columns fit every matrix.
WIDE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 131,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
MIXED = {
    "token_embd.weight": "Q6_K", "output.weight": "Q8_0", "attn_q.weight": "Q4_K",
    "attn_k.weight": "Q5_0", "attn_v.weight": "Q6_K", "attn_output.weight": "F16",
    "ffn_gate.weight": "Q5_K", "ffn_up.weight": "BF16", "ffn_down.weight": "Q4_1",
}  # fmt: skip


def mixed(name: str, shape: tuple[int, ...]) -> str:
    """As real files are: one type here, another there."""
    kind = next(kind for end, kind in MIXED.items() if name.endswith(end))
    return fitting(kind, shape[1])


Twins = Callable[[str, Mapping[str, Any], KindOf], tuple[Path, Path]]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """A GGUF file, and a model that stores what it unpacks to in float32."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str, config: Mapping[str, Any], kind_of: KindOf) -> tuple[Path, Path]:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            tensors = random_weights(spec_from_config(config).tensor_shapes())
            unpacked = write(root / f"{name}.gguf", config, tensors, kind_of)
            made[name] = root / f"{name}.gguf", plain_model(root / "plain", config, unpacked)
        return made[name]

    return make


def assert_same_gradients(ours: Decoder, plain: Decoder, config: lt.LoraConfig) -> None:
    adapter = random_adapter(plain, config)
    vocab = plain.spec.vocab_size
    batch = lt.Batch.from_sequences(*random_batch(vocab, [23, 1, 9, 31], masked=0.4))
    truth = lt.gradients(plain, adapter, batch, "autograd", dropout_seed=7)
    for method in EXACT:
        found = lt.gradients(ours, adapter, batch, method, dropout_seed=7)
        assert found.loss == pytest.approx(truth.loss, rel=1e-12), method
        assert max(relative(found.grads[n], g) for n, g in truth.grads.items()) < 1e-9, method
    ids = batch.ids[:9].tolist()
    assert relative(lt.logits(ours, adapter, ids), lt.logits(plain, adapter, ids)) < 1e-12


@pytest.mark.parametrize("kind", [*TYPES, "mixed"])
def test_gradients_are_autograds_on_the_unpacked_weights(kind: str, twins: Twins) -> None:
    """Rows of q and k are in llama.cpp's order; every type fits every matrix."""
    paths = twins(f"wide-{kind}", WIDE, mixed if kind == "mixed" else all_in(kind))
    ours, plain = (lt.load_model(path, "float64") for path in paths)
    assert ours.stored_dtypes != plain.stored_dtypes or kind == "F32"
    assert_same_gradients(ours, plain, lt.LoraConfig(r=3, lora_dropout=0.2))


@pytest.mark.parametrize("kind", ["Q4_K", "mixed"])
def test_gradients_with_dora_and_biases_and_odd_tiles(kind: str, twins: Twins) -> None:
    config = {
        **WIDE, "model_type": "qwen2", "intermediate_size": 1024, "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    }  # fmt: skip
    paths = twins(f"qwen-{kind}", config, mixed if kind == "mixed" else all_in(kind))
    ours, plain = (lt.load_model(path, "float64") for path in paths)
    assert_same_gradients(ours, plain, lt.LoraConfig(r=3, use_dora=True))
    adapter = random_adapter(plain, lt.LoraConfig(r=3))
    batch = lt.Batch.from_sequences(*random_batch(131, [23, 9]))
    truth = lt.gradients(plain, adapter, batch, "autograd")
    # A quarter of a tile's 512 columns, or of its multiples of 16, cuts blocks of 256.
    method = METHODS["mesp"](MethodOptions(tiles="quarter"))
    found = lt.gradients(ours, adapter, batch, method)
    assert max(relative(found.grads[n], g) for n, g in truth.grads.items()) < 1e-9


@pytest.mark.parametrize("kind", [*TYPES, "mixed"])
def test_float32_is_as_near_the_truth_as_autograd_is(kind: str, twins: Twins) -> None:
    """The noise-floor rule over all gradients in one vector, with 16 eps to spare."""
    path, plain = twins(f"wide-{kind}", WIDE, mixed if kind == "mixed" else all_in(kind))
    small = random_adapter(lt.load_model(plain), lt.LoraConfig(r=8))
    wide = lt.Adapter(small.config, {n: p.double() for n, p in small.items()})
    batch = lt.Batch.from_sequences(*random_batch(131, [23, 9], masked=0.4))

    def flat(model: Decoder, adapter: lt.Adapter, method: str) -> torch.Tensor:
        grads = lt.gradients(model, adapter, batch, method).grads
        return torch.cat([g.double().flatten() for g in grads.values()])

    truth = flat(lt.load_model(plain, "float64"), wide, "autograd")
    naive = flat(lt.load_model(plain), small, "autograd")
    for method in EXACT:
        ours = flat(lt.load_model(path), small, method)
        assert relative(ours, truth) <= 2 * relative(naive, truth) + 16 * EPS32, method


@pytest.mark.parametrize("kind", TYPES)
def test_stories260k_in_each_type(kind: str, tmp_path: Path) -> None:
    """Rows of 64 fit blocks of 32; what has rows of 172, and K types, fall back as in llama.cpp."""
    source = asset("models/stories260K/hf-llama")
    config = json.loads((source / "config.json").read_text())
    shapes = spec_from_config(config).tensor_shapes()
    held = load_file(source / "model.safetensors")
    tensors = {name: held[name] for name in shapes}
    unpacked = write(tmp_path / "stories.gguf", config, tensors, all_in(kind))
    plain = plain_model(tmp_path / "plain", config, unpacked)
    ours, truth = (lt.load_model(path, "float64") for path in (tmp_path / "stories.gguf", plain))
    assert_same_gradients(ours, truth, lt.LoraConfig(r=4))
