"""Small PEFT models for the patch, and their gradients by PEFT and by lowtide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from lowtide.check.conformance import Example

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def small_model(directory: Path, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """A random Llama under LoRA whose B is not zero."""
    example = Example.write(directory, LLAMA)
    return with_lora(example, dtype, **lora)


def with_lora(example: Example, dtype: torch.dtype, **lora: Any) -> Any:
    """An example under a random adapter on all linears; the same one whatever the dtype."""
    config = peft.LoraConfig(
        **{
            "r": 3,
            "lora_alpha": 16,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
            **lora,
        }
    )
    model: Any = peft.get_peft_model(
        example.hf_model(dtype), config, autocast_adapter_dtype=dtype != torch.float64
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(
                    noise * (0.1 if "lora_B" in name else 0.5 * parameter.shape[1] ** -0.5)
                )
            elif parameter.requires_grad:
                parameter.mul_(1.0 + 0.2 * torch.rand(parameter.shape, generator=generator))
    return model.eval()


def step(model: Any, **call: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one call."""
    model.zero_grad(set_to_none=True)
    loss = model(**call).loss
    loss.backward()
    return float(loss.detach()), grads_of(model)


def grads_of(model: Any) -> dict[str, Tensor]:
    """Copies of the gradients, by name."""
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def rows(lengths: Sequence[int], width: int | None = None, seed: int = 5) -> dict[str, Tensor]:
    """A batch padded on the right, with every third label masked."""
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(131, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(width) % 3 == 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def worst(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest relative error of any parameter's gradient."""
    assert set(ours) == set(theirs)
    errors = [
        float((ours[name] - grad).norm() / grad.norm().clamp_min(1e-300))
        for name, grad in theirs.items()
    ]
    return max(errors)
