"""The registry of model families: `model_type` of config.json -> how it becomes a `ModelSpec`.

A new family is one file here and one line in FAMILIES.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowtide.errors import ModelError
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
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
_SENSES = ("vision_config", "audio_config", "speech_config", "video_config")


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
            "*.safetensors) or a Hugging Face hub id such as Qwen/Qwen2.5-0.5B."
        )
    if not path.is_file() and (directory / PARTIAL_FILE).is_file():
        raise ModelError(
            f"{directory} holds a quantised model that was not finished. Give the command that "
            "began it again, and it goes on where it ended."
        )
    if not path.is_file():
        raise ModelError(
            f"{directory} has no config.json, so it is not a model directory. Give the directory "
            "that holds config.json, tokenizer.json and *.safetensors."
        )
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
    kinds = []
    if any(isinstance(fields.get(name), int) and fields[name] > 1 for name in _EXPERTS):
        kinds.append("a mixture of experts, whose MLP differs from token to token")
    if any(fields.get(name) for name in _SENSES):
        kinds.append("a multimodal model, of which lowtide would train the text decoder alone")
    if fields.get("is_encoder_decoder"):
        kinds.append("an encoder with a decoder")
    return f" (it is {' and '.join(kinds)})" if kinds else ""
