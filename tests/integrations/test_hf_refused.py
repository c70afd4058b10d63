"""What a patch refuses by name: models, settings of LoRA, arguments of a call."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hf_small import rows, small_model
from torch import nn

from lowtide.errors import ConfigError, DataError, ModelError
from lowtide.integrations.hf import patch


def _hooked(model: Any) -> None:
    model.get_base_model().model.layers[1].mlp.register_forward_hook(lambda *_: None)


def _merged(model: Any) -> None:
    model.merge_adapter()


def _two(model: Any) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])


def _trained_norm(model: Any) -> None:
    model.get_base_model().model.norm.weight.requires_grad_(True)


def _replaced(model: Any) -> None:
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.forward = mlp.forward


def _attention_dropout(model: Any) -> None:
    model.get_base_model().config.attention_dropout = 0.1


def _attentions(model: Any) -> None:
    model.get_base_model().config._attn_implementation = "eager"
    model.get_base_model().config.output_attentions = True


class _Linear8bit(nn.Linear):
    """Another kind of linear."""


def _quantised(model: Any) -> None:
    module = model.get_base_model().model.layers[0].self_attn.q_proj
    module.base_layer.__class__ = _Linear8bit


def _function(model: Any) -> None:
    model.get_base_model().config.hidden_act = "relu"


def _shape(model: Any) -> None:
    model.get_base_model().config.intermediate_size = 60


def _elsewhere(model: Any) -> None:
    model.get_base_model().model.norm.to("meta")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (_hooked, ConfigError, r"layers\.1\.mlp has a hook, which would not be called; remove it"),
        (_merged, ConfigError, r"has its adapter merged; call model\.unmerge_adapter"),
        (_two, ConfigError, r"active adapters are \['default', 'second'\]; keep one with"),
        (_trained_norm, ConfigError, r"norm\.weight is trained; freeze it"),
        (_replaced, ConfigError, r"forward of .*layers\.0\.mlp was replaced"),
        (_attention_dropout, ModelError, r"attention_dropout = 0\.1 \(supported: none\)"),
        (_attentions, ConfigError, r"config\.output_attentions is on; set it to False"),
        (_quantised, ConfigError, r"q_proj is .*Linear on .*_Linear8bit; expected .* bfloat16"),
        (_function, ModelError, r"hidden_act = 'relu'"),
        (_shape, ModelError, r"another shape: model\.layers\.0\.mlp\.gate_proj.*config says"),
        (_elsewhere, ConfigError, r"parameters lie on cpu, meta; put the model on one device"),
    ],
)
def test_refused_by_name(
    change: Callable[[Any], None], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    model = small_model(tmp_path)
    change(model)
    with pytest.raises(kind, match=message):
        patch(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"bias": "lora_only"}, r"LoraConfig\.bias is 'lora_only'; set it to 'none'"),
        ({"lora_bias": True}, r"LoraConfig\.lora_bias is True; set it to False"),
        ({"modules_to_save": ["lm_head"]}, r"LoraConfig\.modules_to_save is .*; leave it out"),
        ({"trainable_token_indices": [1, 2]}, r"LoraConfig\.trainable_token_indices"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"embed_tokens is adapted \(Embedding\)"),
        ({"alora_invocation_tokens": [3]}, r"q_proj is a variant of LoRA, ALoraLinearVariant"),
    ],
)
def test_settings_of_lora_that_are_refused(
    lora: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = small_model(tmp_path, **lora)
    with pytest.raises(ConfigError, match=message):
        patch(model)


def test_other_models_and_adapters_are_refused(tmp_path: Path) -> None:
    base = small_model(tmp_path).unload()
    with pytest.raises(ConfigError, match=r"got LlamaForCausalLM; expected .*get_peft_model"):
        patch(base)
    other = peft.get_peft_model(base, peft.IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match=r"PEFT's type IA3; lowtide trains LORA"):
        patch(other)
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11)
    lora = peft.LoraConfig(task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)
    with pytest.raises(ModelError, match="model_type 'gpt2' is not supported"):
        patch(theirs)


def test_twice_is_refused(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    with patch(model), pytest.raises(ConfigError, match="patched already; unpatch it first"):
        patch(model)
    patch(model).unpatch()


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        ({"use_cache": True}, ConfigError, r"use_cache; leave it out in training"),
        ({"output_attentions": True}, ConfigError, r"output_attentions; .* never exist"),
        ({"output_hidden_states": True}, ConfigError, r"output_hidden_states; leave it out"),
        ({"logits_to_keep": 3}, ConfigError, r"logits_to_keep; leave it out, or unpatch"),
        ({"return_dict": False}, ConfigError, r"return_dict; do not set it to False"),
        ({"cu_seq_lens_q": torch.tensor([0])}, ConfigError, r"cu_seq_lens_q without position_ids"),
        ({"attention_mask": torch.ones(2, 1, 12, 12)}, DataError, r"is \[2, 1, 12, 12\]; expected"),
        ({"attention_mask": torch.eye(2, 12)[[0, 0]] * 3}, DataError, r"numbers other than 0"),
        ({"attention_mask": 1 - torch.eye(12)[[4, 5]]}, DataError, r"gaps within a row"),
        ({"attention_mask": torch.zeros(2, 12)}, DataError, r"no token: attention_mask is all"),
        ({"labels": torch.ones(2, 5).long()}, DataError, r"labels are \[2, 5\].*\[2, 12\]"),
        ({"labels": torch.ones(2, 12).long()}, DataError, r"a padding position .*padding_side"),
    ],
)
def test_arguments_that_are_refused(
    more: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    model = small_model(tmp_path)
    call = {**rows([12, 7]), **more}
    with patch(model):
        with pytest.raises(kind, match=message):
            model(**call)
        assert math.isfinite(float(model(**rows([12, 7])).loss.detach()))


def test_a_gradient_of_the_entropy_is_refused(tmp_path: Path) -> None:
    import trl.trainer.utils

    model = small_model(tmp_path)
    trl.trainer.utils.add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy"))
    with patch(model):
        out = model(**rows([12, 7]), fused_lm_head=True)
        with pytest.raises(ConfigError, match=r"term of the entropy, .*; detach it"):
            (out.loss - 0.1 * out.entropy.sum()).backward()
