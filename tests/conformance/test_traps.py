"""Where a family's function hides: each trap by its name. docs/families.md lists them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowtide as lt
from lowtide.check.conformance import (
    Example,
    greedy_in_common,
    hf_logits,
    labels_of,
    random_adapter,
    random_ids,
    relative,
)
from lowtide.errors import ModelError
from lowtide.infer.generate import Generation
from lowtide.model.decoder import Decoder
from lowtide.model.families import FAMILIES, spec_from_config
from lowtide.model.spec import LayerSpec

Written = Callable[[tuple[str, int]], Example]


def _changed(model: Decoder, **fields: Any) -> Decoder:
    """The same weights under another spec."""
    from dataclasses import replace

    return Decoder(
        replace(model.spec, **fields), model.checkpoint, model.compute_dtype, "", model.directory
    )


@pytest.mark.parametrize("name", ["gemma", "gemma3_text"])
def test_sixteen_bit_norms_and_embedding_scale_in_float32(name: str, tmp_path: Path) -> None:
    """As transformers loaded in float32: `1 + w` and the root of H are not rounded to the file's
    bfloat16, which a bfloat16 model would do."""
    example = Example.write(tmp_path, FAMILIES[name].examples[0], torch.bfloat16)
    model = example.load(torch.float32)
    assert model.stored_dtypes == ["bfloat16"]
    (ids,) = random_ids(model.spec.vocab_size, [40])
    truth = hf_logits(example.hf_model(torch.float32), ids)
    ours = lt.logits(model, None, ids)
    assert relative(ours, truth) < 1e-5
    scale = float(torch.tensor(model.spec.embedding_scale).bfloat16())
    assert scale != model.spec.embedding_scale
    rounded = _changed(model, embedding_scale=scale)
    assert relative(lt.logits(rounded, None, ids), truth) > 1e-5
    model.norms[0] = model.norms[0]._replace(
        before_mlp=model.norms[0].before_mlp.bfloat16().float()
    )
    assert relative(lt.logits(model, None, ids), truth) > 1e-4


def test_gelu_in_old_gemma_files_is_the_tanh_form() -> None:
    config = dict(FAMILIES["gemma"].examples[0])
    same = [
        spec_from_config({**config, "hidden_act": act}) for act in ("gelu", "gelu_pytorch_tanh")
    ]
    assert same[0] == same[1]
    assert same[0].activation == "gelu_tanh"
    with pytest.raises(ModelError, match="hidden_activation = 'gelu'"):
        spec_from_config({**FAMILIES["gemma2"].examples[0], "hidden_activation": "gelu"})


def test_gemma3_has_no_attention_softcap_whatever_its_config_says(tmp_path: Path) -> None:
    """transformers reads the field and does not pass it on; who set it meant something else."""
    config = {**FAMILIES["gemma3_text"].examples[0], "attn_logit_softcapping": 1.0}
    with pytest.raises(ModelError, match=r"attn_logit_softcapping = 1\.0 \(supported: none\)"):
        spec_from_config(config)
    capped = Example.write(tmp_path / "capped", config).hf_model(torch.float64)
    plain = Example(tmp_path / "capped", FAMILIES["gemma3_text"].examples[0])
    ids = list(range(30))
    assert hf_logits(capped, ids).equal(hf_logits(plain.hf_model(torch.float64), ids))


@pytest.mark.parametrize(
    ("name", "field", "plain"),
    [
        ("gemma2", "attention_softcap", 0.0),
        ("gemma2", "logit_softcap", 0.0),
        ("gemma2", "attention_scale", None),
        ("gemma2", "norm_offset", 0.0),
        ("gemma2", "layers", (LayerSpec(),) * 3),
        ("gemma3_text", "ropes", "the first for all"),
        ("gemma3_text", "activation", "silu"),
        ("granite", "embedding_scale", 1.0),
        ("granite", "residual_scale", 1.0),
        ("granite", "logit_scale", 1.0),
        ("granite", "attention_scale", None),
        ("smollm3", "layers", (LayerSpec(),) * 4),
        ("mistral", "layers", (LayerSpec(),) * 2),
    ],
)
def test_every_unusual_part_shows_in_the_logits(
    name: str, field: str, plain: Any, written: Written
) -> None:
    """Or the conformance tests would not see it go wrong."""
    model = written((name, 0)).load()
    (ids,) = random_ids(model.spec.vocab_size, [40])
    if field == "ropes":
        plain = (model.spec.ropes[0],) * 2
    without = lt.logits(_changed(model, **{field: plain}), None, ids)
    assert relative(without, lt.logits(model, None, ids)) > 1e-3


@pytest.mark.parametrize("tokens", [15, 16, 17, 40])
def test_long_factors_rotate_the_whole_of_a_longer_sequence(tokens: int, written: Written) -> None:
    """The original context of this example is 16 tokens."""
    example = written(("phi3", 0))
    model = example.load()
    (ids,) = random_ids(model.spec.vocab_size, [tokens])
    assert (
        relative(lt.logits(model, None, ids), hf_logits(example.hf_model(torch.float64), ids))
        < 1e-6
    )


def test_generation_across_the_original_context(written: Written) -> None:
    """Keys that were rotated for a short sequence are rotated again when it grows past 16."""
    example = written(("phi3", 0))
    model = example.load()
    (ids,) = random_ids(model.spec.vocab_size, [40])
    generation = Generation(model, None, 40)
    for stop in range(1, 41):
        fed = generation.feed([ids[stop - 1]])
        assert relative(fed, lt.logits(model, None, ids[:stop])[-1]) < 1e-12
    assert greedy_in_common(example, model, ids[:9]) == 40


def test_each_sequence_of_a_batch_has_factors_of_its_own(written: Written) -> None:
    """transformers takes the longest of a padded batch for all; here packing changes nothing."""
    model = written(("phi3", 0)).load()
    adapter = random_adapter(model)
    rows = random_ids(model.spec.vocab_size, [30, 10])
    both = lt.gradients(model, adapter, lt.Batch.from_sequences(rows, labels_of(rows)))
    parts = [
        lt.gradients(model, adapter, lt.Batch.from_sequences([row], labels_of([row])))
        for row in rows
    ]
    for name, grad in both.grads.items():
        apart = sum(one.grads[name] * one.n_tokens for one in parts) / both.n_tokens
        assert relative(grad, apart) < 1e-9


def test_no_rope_layers_has_a_one_for_each_layer_that_rotates() -> None:
    config = FAMILIES["smollm3"].examples[1]
    ropes = [layer.rope for layer in spec_from_config(config).layers]
    assert config["no_rope_layers"] == [0, 1, 0]
    assert ropes == [None, 0, None]


def test_a_missing_window_is_not_a_window_of_null() -> None:
    config = dict(FAMILIES["mistral"].examples[0])
    config.pop("sliding_window")
    assert spec_from_config(config).layers[0].window == 4096
    assert spec_from_config({**config, "sliding_window": None}).layers[0].window == 0


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "a mixture of experts"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "a mixture of experts"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 256}, "a mixture of experts"),
        ({"model_type": "qwen2_vl", "vision_config": {"depth": 32}}, "a multimodal model; lowtide"),
        ({"model_type": "phi4mm", "embd_layer": {"a": 1}}, "a multimodal model"),
        (
            {"model_type": "llama4", "vision_config": {"a": 1}, "text_config": {"num_experts": 16}},
            "a mixture of experts, whose MLP differs from token to token, and a multimodal model",
        ),
        ({"model_type": "mamba", "state_size": 16}, "layers that are no attention"),
        ({"model_type": "lfm2", "conv_L_cache": 3}, "layers that are no attention"),
        (
            {"model_type": "qwen3_next", "linear_num_value_heads": 32, "num_experts": 512},
            "a mixture of experts, whose MLP differs from token to token, and a model with layers",
        ),
        ({"model_type": "deepseek_v2", "kv_lora_rank": 512}, "keys and values come from a common"),
        ({"model_type": "gpt2", "n_positions": 1024}, "a learned vector for each position"),
        ({"model_type": "bert", "type_vocab_size": 2}, "(it is an encoder)"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "(it is an encoder with a decoder)"),
        ({"architectures": ["LlamaForCausalLM"]}, "config.json has no model_type, so nobody"),
        (
            {"model_type": "gemma3", "vision_config": {"depth": 27}, "text_config": {}},
            "Gemma 3 with a vision tower",
        ),
        ({"model_type": "granite", "num_local_experts": 4}, "num_local_experts = 4 is not a field"),
    ],
)
def test_what_is_no_plain_decoder_is_said_to_be_that(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        spec_from_config(config)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_fused_projection_is_one_target_and_its_parts_are_none(written: Written) -> None:
    model = written(("phi3", 1)).load()
    adapter = lt.Adapter.create(model, lt.LoraConfig(target_modules="qkv_proj,down_proj"))
    assert adapter.modules == ("self_attn.qkv_proj", "mlp.down_proj")
    shape = adapter.parameters["base_model.model.model.layers.0.self_attn.qkv_proj.lora_B.weight"]
    assert shape.shape == (3 * 44, 8)
    with pytest.raises(lt.errors.ConfigError, match="Choose 'all-linear' or names among qkv_proj"):
        lt.Adapter.create(model, lt.LoraConfig(target_modules="q_proj"))


def test_what_the_text_model_needs_may_lie_inside(written: Written) -> None:
    config = FAMILIES["gemma3"].examples[0]
    inside = spec_from_config(json.loads(json.dumps(config)))
    assert inside.model_type == "gemma3"
    assert {**vars(inside), "model_type": ""} == {
        **vars(spec_from_config(config["text_config"])), "model_type": "",
    }  # fmt: skip
