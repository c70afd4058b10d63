"""The registry of model families: `model_type` of config.json -> a function to `ModelSpec`.

A new family is one file here and one line in FAMILIES.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowtide.errors import ModelError
from lowtide.model.spec import ModelSpec
from lowtide.weights.manifest import PARTIAL_FILE

from .llama import llama_spec
from .qwen2 import qwen2_spec

FAMILIES: dict[str, Callable[[Mapping[str, Any]], ModelSpec]] = {
    "llama": llama_spec,
    "qwen2": qwen2_spec,
}


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
            f"model_type {model_type!r} is not supported; lowtide knows "
            f"{', '.join(sorted(FAMILIES))}. See CONTRIBUTING.md, 'Add a family'."
        )
    return FAMILIES[model_type](raw)
