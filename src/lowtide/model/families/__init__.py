"""The registry of model families: `model_type` of config.json -> how it becomes a `ModelSpec`.

A new family is one file here and one line in FAMILIES.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowtide.errors import MOST_CONFIG_BYTES, ModelError
from lowtide.model.spec import ModelSpec
from lowtide.weights.manifest import PARTIAL_FILE

from .common import Family
from .gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_TEXT
from .granite import GRANITE
from .llama import LLAMA
from .mistral import MISTRAL
from .olmo2 import OLMO2
from .phi3 import PHI3
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gemma3_text": GEMMA3_TEXT,
    "granite": GRANITE,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "olmo2": OLMO2,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "smollm3": SMOLLM3,
}
_SIGNS = {
    "a mixture of experts, whose MLP differs from token to token": (
        *("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"),
    ),
    "a multimodal model; lowtide trains text decoders": (
        *("vision_config", "audio_config", "speech_config", "video_config"),
        *("img_processor", "audio_processor", "embd_layer"),
    ),
    "a model with layers that are no attention: of a state space, a recurrence or convolutions": (
        *("state_size", "ssm_cfg", "mamba_d_state", "mamba_d_ssm", "attention_hidden_size"),
        *("linear_num_value_heads", "conv_L_cache"),
    ),
    "a model whose keys and values come from a common latent": ("kv_lora_rank",),
    "an encoder with a decoder": ("is_encoder_decoder",),
    "an encoder": ("type_vocab_size",),
    "a model with a learned vector for each position": ("n_positions", "n_ctx"),
}
"""What a model is that no family here could describe, and the fields that tell."""


def read_config(directory: Path) -> dict[str, Any]:
    """The parsed config.json of a model directory.

    Args:
        directory: a model directory.

    Returns:
        The object in config.json.

    Raises:
        ModelError: the directory or the file is missing, or it is not a JSON object.
    """
    path = directory / "config.json"
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "does not exist"
        raise ModelError(
            f"{directory} {found}; give a model directory (config.json, tokenizer.json, "
            "*.safetensors), a GGUF file or a Hugging Face hub id such as Qwen/Qwen2.5-0.5B."
        )
    if not path.is_file() and (directory / PARTIAL_FILE).is_file():
        raise ModelError(
            f"{directory} holds a quantised model that was not finished. Give the command that "
            "began it again, and it goes on where it ended."
        )
    files = sorted(one.name for one in directory.glob("*.gguf"))
    if not path.is_file() and files:
        raise ModelError(
            f"{directory} has no config.json, and holds GGUF files. Give one of them: "
            f"{', '.join(str(directory / name) for name in files[:3])}."
        )
    if not path.is_file():
        raise ModelError(
            f"{directory} has no config.json, so it is not a model directory. Give the directory "
            "that holds config.json, tokenizer.json and *.safetensors."
        )
    if (size := path.stat().st_size) > MOST_CONFIG_BYTES:
        raise ModelError(f"{path} has {size:,} bytes; no model's does. Download it again.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path} holds {type(raw).__name__}, not an object. Download it again.")
    return raw


def spec_from_config(raw: Mapping[str, Any]) -> ModelSpec:
    """Map a parsed config.json to a `ModelSpec` through the registry.

    Args:
        raw: a parsed config.json.

    Returns:
        The spec.

    Raises:
        ModelError: the model_type is not supported, or a field that changes the function is not.
    """
    model_type = raw.get("model_type")
    if model_type is None:
        raise ModelError(
            f"config.json has no model_type{_what_it_is(raw)}, so nobody can say what model it "
            "describes. Download it again, or take it from the model that yours was made of."
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(
            f"model_type {model_type!r} is not supported{_what_it_is(raw)}; lowtide knows "
            f"{', '.join(sorted(FAMILIES))}. See CONTRIBUTING.md, 'Add a family'."
        )
    return FAMILIES[model_type].spec(raw)


def _what_it_is(raw: Mapping[str, Any]) -> str:
    """What kind of model this is, where it is one that no family here could describe."""
    text = raw.get("text_config")
    fields = {**(text if isinstance(text, Mapping) else {}), **raw}
    kinds = [
        kind
        for kind, signs in _SIGNS.items()
        if any((value := fields.get(sign)) and (value is True or value != 1) for sign in signs)
    ]
    return f" (it is {', and '.join(kinds)})" if kinds else ""
