"""config.json: each field is used, known to be harmless, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers import asset

from lowtide.errors import ModelError
from lowtide.model.families import spec_from_config

LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 74,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QWEN2 = {**LLAMA, "model_type": "qwen2"}
GEMMA3 = {**LLAMA, "model_type": "gemma3_text"}


def _refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ModelError) as error:
        spec_from_config(config)
    assert error.value.exit_code == 2
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen2.5-3B-Instruct", 3_085_938_688),
        ("Llama-3.2-1B", 1_235_814_400),
        ("Llama-3.2-1B-Instruct", 1_235_814_400),
        ("SmolLM2-135M", 134_515_008),
        ("Qwen3-0.6B", 596_049_920),
        ("gemma-3-1b-it", 999_885_952),
    ],
)
def test_real_models_have_their_published_number_of_parameters(name: str, parameters: int) -> None:
    config = json.loads(asset(f"configs/{name}/config.json").read_text())
    assert spec_from_config(config).n_parameters == parameters


def test_real_windows_and_bases() -> None:
    spec = spec_from_config(json.loads(asset("configs/gemma-3-1b-it/config.json").read_text()))
    windows = [layer.window for layer in spec.layers]
    assert windows == ([512] * 5 + [0]) * 4 + [512] * 2
    assert {spec.ropes[layer.rope or 0].theta for layer in spec.layers if layer.window} == {1e4}
    assert spec.ropes[0].theta == 1e6
    assert spec.tied_head


@pytest.mark.parametrize(("first", "sliding"), [(28, 0), (2, 1), (0, 3)])
def test_windows_where_they_are_switched_on(first: int, sliding: int) -> None:
    on = {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": first}
    spec = spec_from_config({**QWEN2, **on})
    assert [layer.window for layer in spec.layers] == [0] * (3 - sliding) + [128] * sliding


@pytest.mark.parametrize("model_type", [7, "", "bert"])
def test_a_model_type_that_is_none(model_type: object) -> None:
    assert f"model_type {model_type!r} is not supported" in _refusal(
        {**LLAMA, "model_type": model_type}
    )


@pytest.mark.parametrize(
    ("base", "change", "problem"),
    [
        (QWEN2, {"use_sliding_window": "yes"}, "use_sliding_window = 'yes'"),
        (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = "),
        (QWEN2, {"layer_types": ["chunked_attention"] * 3}, "layer_types = "),
        (
            QWEN2,
            {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
            "layer_types has sliding_attention, and there is no window",
        ),
        (QWEN2, {"use_mrope": True}, "use_mrope = True"),
        (LLAMA, {"sliding_window": 128}, "sliding_window = 128"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act = 'gelu' (supported: silu)"),
        (LLAMA, {"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved = True"),
        (LLAMA, {"rope_scaling": {"rope_type": ["linear"]}}, "rope type ['linear']"),
        (LLAMA, {"num_local_experts": 8}, "num_local_experts = 8 is not a field"),
        (LLAMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        (LLAMA, {"residual_multiplier": 0.2}, "residual_multiplier = 0.2"),
        (LLAMA, {"attention_bias": "yes"}, "attention_bias = 'yes' (expected true or false)"),
        (LLAMA, {"rope_scaling": {"rope_type": "mrope"}}, "rope type 'mrope' (supported: default,"),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn"}}, "factor is missing"),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "yarn", "factor": 4, "truncate": 1}},
            "truncate = 1",
        ),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "yarn", "factor": 4, "rope_theta": 1}},
            "rope_theta = 1 (expected more, with rope type 'yarn')",
        ),
        (
            LLAMA,
            {
                "rope_scaling": {"type": "linear", "factor": 4},
                "rope_parameters": {"rope_type": "linear", "factor": 2},
            },
            "rope_parameters and rope_scaling are both there and differ",
        ),
        (
            GEMMA3,
            {"rope_parameters": {"rope_type": "linear", "factor": 2}},
            "rope_parameters has neither full_attention nor sliding_attention",
        ),
        (
            {**LLAMA, "model_type": "phi3", "rope_scaling": None},
            {
                "head_dim": 2**31,
                "rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]},
            },
            "short_factor: 1 of them (expected 1073741824 positive numbers)",
        ),
        (GEMMA3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 (supported: 1)"),
        (GEMMA3, {"rope_parameters": {"full_attention": "wide"}}, "rotary settings are 'wide'"),
        (LLAMA, {"rope_parameters": {"rope_type": "longrope"}}, "short_factor: None (expected 5"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling = 'linear'"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "factor is missing"),
        (
            LLAMA,
            {"rope_scaling": {"type": "linear", "factor": 2, "mscale": 0.7}},
            "rope field mscale = 0.7",
        ),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
            "low_freq_factor is missing",
        ),
        (LLAMA, {"rope_theta": -1}, "rope_theta = -1"),
        (LLAMA, {"rms_norm_eps": "small"}, "rms_norm_eps = 'small'"),
        (LLAMA, {"hidden_size": None}, "hidden_size is missing"),
        (LLAMA, {"hidden_size": 40.5}, "hidden_size = 40.5 (expected an integer)"),
        (LLAMA, {"vocab_size": 0}, "vocab_size = 0 (expected a positive number)"),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers = True"),
        (LLAMA, {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads = 3"),
        (LLAMA, {"hidden_size": 42}, "hidden_size = 42 is not a multiple"),
        (LLAMA, {"head_dim": 7}, "head_dim = 7 is odd"),
    ],
    ids=str,
)
def test_what_changes_the_function_is_refused_by_name(
    base: dict[str, Any], change: dict[str, Any], problem: str
) -> None:
    spec_from_config(base)
    message = _refusal({**base, **change})
    assert problem in message
    assert "lowtide never ignores a setting" in message


def test_several_problems_are_told_together() -> None:
    message = _refusal({**LLAMA, "hidden_act": "gelu", "head_dim": 7, "novelty": 1})
    assert all(part in message for part in ("hidden_act", "head_dim = 7", "novelty = 1"))


@pytest.mark.parametrize(
    ("base", "extras"),
    [
        (
            LLAMA,
            {
                "architectures": ["LlamaForCausalLM"],
                "bos_token_id": 1,
                "eos_token_id": [1, 2],
                "initializer_range": 0.02,
                "pretraining_tp": 1,
                "torch_dtype": "bfloat16",
                "transformers_version": "4.40.1",
                "use_cache": True,
                "is_llama_config": True,
                "rope_interleaved": False,
                "_attn_implementation": "eager",
                "novelty": None,
                "new_switch": False,
                "hidden_act": "swish",
            },
        ),
        (QWEN2, {"use_sliding_window": False, "sliding_window": 128, "max_window_layers": 1}),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 3}),
        (QWEN2, {"layer_types": ["full_attention"] * 3, "use_mrope": False}),
        (LLAMA, {"rope_scaling": None, "rope_parameters": {"rope_type": "default"}}),
    ],
    ids=str,
)
def test_what_changes_nothing_is_accepted(base: dict[str, Any], extras: dict[str, Any]) -> None:
    assert spec_from_config({**base, **extras}) == spec_from_config(base)


def test_transformers_own_defaults_are_ours() -> None:
    transformers = pytest.importorskip("transformers")
    for base, kind in ((LLAMA, transformers.LlamaConfig), (QWEN2, transformers.Qwen2Config)):
        known = kind(**{k: v for k, v in base.items() if k != "model_type"})
        spec = spec_from_config(base)
        assert spec.rms_norm_eps == known.rms_norm_eps
        assert spec.max_positions == known.max_position_embeddings
        assert spec.tied_head == known.tie_word_embeddings
        assert spec.ropes[0].theta == known.rope_parameters["rope_theta"]
        assert spec.head_dim == 10
        # What transformers writes today reads as the same model.
        assert spec_from_config(json.loads(known.to_json_string(use_diff=False))) == spec
