"""What can be patched, and what is refused by name with what to do instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.errors import ConfigError, listed

from .inner import targets_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def require_peft(model: Any) -> None:
    """Refuse anything but a causal LM under PEFT's LoRA.

    Args:
        model: what was passed to `patch`.

    Raises:
        ConfigError: says what it is instead.
    """
    from peft import PeftModelForCausalLM

    if not isinstance(model, PeftModelForCausalLM):
        raise ConfigError(
            f"patch() got {type(model).__name__}; expected a causal LM under PEFT "
            "(PeftModelForCausalLM). Make one with peft.get_peft_model(model, peft.LoraConfig("
            "task_type='CAUSAL_LM', target_modules='all-linear')), or pass trainer.model where "
            "SFTTrainer got a peft_config."
        )
    kind = str(getattr(model.peft_type, "value", model.peft_type))
    if kind != "LORA":
        raise ConfigError(f"the adapter is of PEFT's type {kind}; lowtide trains LORA.")


def require_supported(model: Any) -> None:
    """Refuse, all at once, what would not be what lowtide computes.

    Args:
        model: a causal LM under PEFT's LoRA.

    Raises:
        ConfigError: lists every problem with its remedy.
    """
    problems = [
        *_of_adapter(model),
        *_of_config(model),
        *_of_parameters(model),
        *_of_modules(model),
    ]
    if problems:
        raise ConfigError(
            f"this model cannot be patched:\n{listed(problems)}\nMend these, or train it "
            "without lowtide."
        )


def _of_adapter(model: Any) -> Iterator[str]:
    active = list(model.active_adapters)
    if len(active) != 1:
        yield f"active adapters are {active}; keep one with model.set_adapter('{active[0]}')"
        return
    config = model.peft_config[active[0]]
    refused = {
        "modules_to_save": "leave it out: lowtide trains LoRA matrices only",
        "lora_bias": "set it to False",
        "trainable_token_indices": "leave it out",
        "target_parameters": "use target_modules",
        "layer_replication": "leave it out",
    }
    for name, remedy in refused.items():
        value = getattr(config, name, None)
        if value:
            yield f"LoraConfig.{name} is {value!r}; {remedy}"
    if config.bias != "none":
        yield f"LoraConfig.bias is {config.bias!r}; set it to 'none'"


def _of_config(model: Any) -> Iterator[str]:
    config = model.get_base_model().config
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, False):
            yield f"config.{name} is on; set it to False: these never exist as a whole"
    if getattr(model.get_base_model(), "hf_quantizer", None) is not None:
        yield "the weights are quantised by transformers; load them in bfloat16 or float32"


def _of_parameters(model: Any) -> Iterator[str]:
    devices = set()
    for name, parameter in model.named_parameters():
        devices.add(parameter.device)
        if parameter.requires_grad and ".lora_" not in name:
            yield f"{name} is trained; freeze it (requires_grad_(False)): lowtide trains LoRA only"
        if type(parameter.data) is not Tensor:
            yield (
                f"{name} is a {type(parameter.data).__name__}, a part of a tensor; train on one "
                "device, without tensor parallelism or FSDP"
            )
    if len(devices) > 1:
        yield (
            f"parameters lie on {', '.join(sorted(map(str, devices)))}; put the model on one "
            "device (device_map=None)"
        )


def _of_modules(model: Any) -> Iterator[str]:
    causal_lm = model.get_base_model()
    backbone = causal_lm.base_model
    embedding = causal_lm.get_input_embeddings()
    adapted = {id(target.module): target for target in targets_of(causal_lm)}
    inside = {id(module) for target in adapted.values() for module in target.module.modules()}
    for name, module in model.named_modules():
        hooked = any(getattr(module, hooks) for hooks in _HOOKS)
        if hooked and module is not model and module is not embedding:
            yield f"{name} has a hook, which would not be called; remove it"
        if "forward" in vars(module) and module not in (model, causal_lm, backbone):
            yield f"the forward of {name} was replaced, by accelerate or a kernel library; undo it"
        if id(module) in adapted:
            yield from _of_target(name, module, model.active_adapter)
        elif hasattr(module, "lora_A"):
            yield (
                f"{name} is adapted ({type(module).__name__}), which is outside of the blocks or "
                "no linear; leave it out of target_modules"
            )
        elif isinstance(module, nn.Dropout) and module.p > 0 and id(module) not in inside:
            yield f"{name} drops {module.p} of its input; set that rate to 0.0 in the config"


def _of_target(name: str, module: Any, adapter: str) -> Iterator[str]:
    from peft.tuners.lora.layer import Linear

    base = module.get_base_layer()
    if type(module) is not Linear or type(base) is not nn.Linear or module.fan_in_fan_out:
        yield (
            f"{name} is {type(module).__module__}.{type(module).__name__} on "
            f"{type(base).__module__}.{type(base).__name__}; expected PEFT's plain Linear on "
            "torch.nn.Linear (bitsandbytes and other quantised layers: load in bfloat16)"
        )
        return
    if module.merged:
        yield f"{name} has its adapter merged; call model.unmerge_adapter()"
    if len(module.active_adapters) != 1:
        yield f"{name} has several active adapters, {module.active_adapters}; keep one"
    if adapter not in module.lora_A:
        return
    variant = type(module.lora_variant.get(adapter)).__name__
    if variant not in ("NoneType", "DoraLinearVariant"):
        yield f"{name} is a variant of LoRA, {variant}; lowtide has plain LoRA, rsLoRA and DoRA"
    if module.lora_B[adapter].bias is not None:
        yield f"{name} has a bias in its adapter; set LoraConfig.lora_bias to False"
    if type(module.lora_dropout[adapter]) not in (nn.Identity, nn.Dropout):
        yield f"{name} has a dropout of its own kind; use LoraConfig.lora_dropout"


def require_eager() -> None:
    """Refuse to be traced by torch.compile.

    Raises:
        ConfigError: it is.
    """
    if torch.compiler.is_compiling():
        raise ConfigError(
            "a patched model is being compiled; leave torch.compile (torch_compile=True) out: "
            "lowtide's blocks are not traced."
        )
