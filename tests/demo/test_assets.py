"""The bundled model: complete, small, a plain Qwen2 checkpoint, and good at its task."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer

from lowtide.demo.assets import (
    BOS,
    CHAT_TEMPLATE,
    END,
    MAX_ASSET_BYTES,
    MODEL_FILES,
    SPECIAL_TOKENS,
    asset_dir,
    prompt_text,
)
from lowtide.demo.household import household
from lowtide.demo.requests import generic_examples


def _json(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((asset_dir() / name).read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(asset_dir() / "tokenizer.json"))


def test_complete_and_small() -> None:
    present = {path.name for path in asset_dir().iterdir()}
    assert {*MODEL_FILES, "README.md"} <= present
    total = sum(path.stat().st_size for path in asset_dir().parent.rglob("*") if path.is_file())
    assert total <= MAX_ASSET_BYTES


def test_weights_are_a_tied_bfloat16_qwen2_of_the_configured_shape() -> None:
    config = _json("config.json")
    assert config["model_type"] == "qwen2"
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_width = hidden // heads * config["num_key_value_heads"]
    with safe_open(str(asset_dir() / "model.safetensors"), framework="pt") as weights:
        shapes = {}
        for name in weights.keys():
            found = weights.get_slice(name)
            assert found.get_dtype() == "BF16"
            shapes[name] = found.get_shape()
    assert "lm_head.weight" not in shapes
    assert shapes["model.embed_tokens.weight"] == [config["vocab_size"], hidden]
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == [kv_width, hidden]
    assert shapes["model.layers.0.self_attn.q_proj.bias"] == [hidden]
    assert len(shapes) == 12 * config["num_hidden_layers"] + 2


def test_tokenizer_round_trips_the_generators_text(tokenizer: Tokenizer) -> None:
    split = household()
    for drawn in [*generic_examples(9, 500), *split.train, *split.test]:
        for text in (drawn.prompt, drawn.completion):
            assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_answers_are_short(tokenizer: Tokenizer) -> None:
    lengths = [len(tokenizer.encode(drawn.completion).ids) for drawn in household().test]
    assert sum(lengths) / len(lengths) <= 30
    assert max(lengths) <= 60


def test_special_tokens_are_single_and_agree_with_the_configs(tokenizer: Tokenizer) -> None:
    for token in SPECIAL_TOKENS:
        assert tokenizer.encode(token).ids == [tokenizer.token_to_id(token)]
    config, settings = _json("config.json"), _json("tokenizer_config.json")
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert (settings["bos_token"], settings["eos_token"]) == (BOS, END)
    assert config["bos_token_id"] == tokenizer.token_to_id(BOS)
    assert config["eos_token_id"] == tokenizer.token_to_id(END)


def test_chat_template_renders_what_the_model_was_trained_on() -> None:
    assert _json("tokenizer_config.json")["chat_template"] == CHAT_TEMPLATE
    template = ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    turn = {"role": "user", "content": "lights on"}
    assert template.render(
        messages=[turn], bos_token=BOS, add_generation_prompt=True
    ) == prompt_text("lights on")
    answer = {"role": "assistant", "content": "{}"}
    whole = template.render(messages=[turn, answer], bos_token=BOS, add_generation_prompt=False)
    assert whole == prompt_text("lights on") + "{}" + END
