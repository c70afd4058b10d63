"""Small tools that several test rooms share: frozen matrices, odd models, the truth to hold to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowtide.check.conformance import file_name as file_name
from lowtide.check.conformance import hf_logits as hf_logits
from lowtide.check.conformance import random_adapter as random_adapter
from lowtide.check.conformance import relative as relative
from lowtide.weights.matrix import MappedMatrix

ASSETS = Path(__file__).resolve().parents[1] / ".." / "shared" / "assets"
EPS32 = torch.finfo(torch.float32).eps

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # With head_dim 10 and a base of 5e4, wavelengths 6, 55 and 476 meet the rule's three branches:
    # below 128 / 4, between, above 128.
    "original_max_position_embeddings": 128,
}
# Odd on purpose: nothing divides anything, no two sizes are equal.
_TINY = {
    "vocab_size": 131,
    "hidden_size": 45,
    "intermediate_size": 74,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-mqa": {"model_type": "qwen2", "rms_norm_eps": 1e-6},
    "qwen2-gqa3-untied": {
        "model_type": "qwen2",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "tie_word_embeddings": False,
        "rope": {"rope_theta": 1e6},
    },
    "llama-biases-llama3": {
        "model_type": "llama",
        "head_dim": 10,
        "attention_bias": True,
        "mlp_bias": True,
        "rope": {"rope_theta": 5e4, **LLAMA3_ROPE},
    },
    "llama-linear-untied": {
        "model_type": "llama",
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 22,
        "tie_word_embeddings": False,
        "rope": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.5},
    },
    # Wide enough for three MLP tiles and several vocabulary tiles of the real workspace.
    "llama-many-tiles": {
        "model_type": "llama",
        "hidden_size": 40,
        "intermediate_size": 1100,
        "vocab_size": 3203,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
    },
}


def asset(name: str) -> Path:
    """A file of real material; skips the test where it is absent."""
    path = ASSETS / name
    if not path.exists():
        pytest.skip(f"needs real material that is not here: ../shared/assets/{name}")
    return path


def frozen(weight: Tensor, compute: torch.dtype = torch.float64) -> MappedMatrix:
    """A plain tensor as the ops' frozen matrix."""
    return MappedMatrix(weight, compute)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that depend on the shape and the seed only."""
    generator = torch.Generator().manual_seed(hash((shape, seed)) % (1 << 31))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_noise_floor(
    ours: Tensor, naive: Tensor, truth: Tensor, magnitude: Tensor | float
) -> None:
    """`|truth - ours| <= 2 |truth - naive| + a few roundings`, element by element.

    Args:
        ours: the result under test, float32.
        naive: the same function written plainly, float32.
        truth: the same function in float64.
        magnitude: size of the summed terms. A sum of n terms of size m rounds by about
            eps m sqrt(n); 8 eps m leaves room for the n of these tests where naive is lucky.
    """
    ours, naive, truth = (t.detach() for t in (ours, naive, truth))
    error = (ours.double() - truth).abs()
    allowed = 2 * (naive.double() - truth).abs() + 8 * EPS32 * magnitude
    excess = error - allowed
    worst = int(excess.argmax())
    assert float(excess.max()) <= 0, (
        f"element {worst}: ours {ours.flatten()[worst]:.9g}, naive {naive.flatten()[worst]:.9g}, "
        f"truth {truth.flatten()[worst]:.12g}"
    )


def hf_config(shape: Mapping[str, Any]) -> Any:
    """A transformers config of one of SHAPES."""
    import transformers

    fields = {**_TINY, **shape}
    rope = {"rope_theta": 1e4, "rope_type": "default", **fields.pop("rope", {})}
    kinds = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
    return kinds[fields.pop("model_type")](rope_parameters=rope, **fields)


def write_model(
    directory: Path,
    shape: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    seed: int = 0,
) -> Path:
    """Save a random model with transformers. Norm weights and biases are random too."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(hf_config(shape))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def hf_model(directory: Path, dtype: torch.dtype) -> Any:
    """The model as transformers has it, in eager attention."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    )
    return model.eval()


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Let transformers keep float64 where it insists on float32: RMSNorm and eager softmax.

    What is left of float32 is the rotary angles, which both sides round alike, so that the two
    implementations can be compared far below float32's rounding.
    """
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    def norm(self: Any, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (x * scale)

    softmax = F.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim=dim))
        for kind in (LlamaRMSNorm, Qwen2RMSNorm):
            patch.setattr(kind, "forward", norm)
        yield


def random_batch(
    vocab_size: int, lengths: Sequence[int], masked: float = 0.0, seed: int = 0
) -> tuple[list[list[int]], list[list[int]]]:
    """Random sequences, and their labels of which about a `masked` part is -100."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]
    labels = [
        [t if float(torch.rand(1, generator=generator)) >= masked else -100 for t in row]
        for row in ids
    ]
    return ids, labels


def peft_gradients(
    directory: Path,
    adapter_directory: Path,
    dtype: torch.dtype,
    ids: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
) -> tuple[float, dict[str, Tensor]]:
    """Loss and LoRA gradients by transformers + peft, one sequence at a time, by PEFT's names."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(
        hf_model(directory, dtype), adapter_directory, is_trainable=True
    ).eval()
    total = torch.zeros((), dtype=dtype)
    count = 0
    for row, row_labels in zip(ids, labels, strict=True):
        logits = model(input_ids=torch.tensor([list(row)]), use_cache=False).logits[0]
        targets = torch.tensor(list(row_labels))[1:]
        count += int((targets != -100).sum())
        if len(targets):
            total = total + F.cross_entropy(
                logits[:-1], targets, ignore_index=-100, reduction="sum"
            )
    loss = total / count
    loss.backward()
    grads = {
        file_name(name): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert all(grad is not None and grad.dtype == dtype for grad in grads.values())
    return float(loss.detach()), grads
