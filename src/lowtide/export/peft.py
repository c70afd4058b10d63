"""PEFT's adapter files: adapter_model.safetensors and adapter_config.json, written and read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowtide.errors import MOST_CONFIG_BYTES, AdapterError, ConfigError, OutputError, listed, shown
from lowtide.model.adapter import Adapter, LoraConfig, adapter_shapes
from lowtide.model.decoder import Decoder
from lowtide.weights.writer import write_atomically, write_safetensors

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_NAME = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_[AB]\.weight")
_MODULE = re.compile(r"model\.layers\.(\d+)\.(.+)")
# Settings of PEFT's LoraConfig under which its function is one that we have. Others are refused.
_PLAIN: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
    "exclude_modules": (None, []),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    # The other initialisations (pissa, olora, corda, loftq, lora_ga) change the frozen weights too.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
}


def save_adapter(adapter: Adapter, directory: Path, base_model: str | None = None) -> None:
    """Write both files; see `Adapter.save`.

    Args:
        adapter: what to write.
        directory: made if it does not exist.
        base_model: what `base_model_name_or_path` should say.

    Raises:
        OutputError: the directory cannot be written or the disk is too full.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{directory} cannot be made: {error.strerror}. Choose another directory."
        ) from error
    write_safetensors(directory / WEIGHTS_FILE, adapter.parameters)
    write_atomically(directory / CONFIG_FILE, [config_text(adapter, base_model)])


def config_text(adapter: Adapter, base_model: str | None) -> bytes:
    """adapter_config.json as it is written."""
    return (json.dumps(adapter_config(adapter, base_model), indent=2) + "\n").encode()


def adapter_config(adapter: Adapter, base_model: str | None) -> dict[str, Any]:
    """The content of adapter_config.json."""
    config = adapter.config
    layers = config.layers_to_transform
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": [module.split(".")[-1] for module in adapter.modules],
        "layers_to_transform": None if layers is None else list(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
    }


def load_adapter(directory: Path, model: Decoder) -> Adapter:
    """Read both files and fit them to the model; see `Adapter.load`.

    Args:
        directory: a PEFT adapter directory.
        model: the model it must fit.

    Returns:
        The adapter in the model's compute dtype.

    Raises:
        AdapterError: a file is missing or broken, the adapter is of a kind that is not supported,
            or it does not fit the model.
    """
    stored = open_adapter(directory, model)
    adapter = Adapter.zeros(model, stored.config)
    for name, parameter in adapter.items():
        parameter.copy_(stored.parameters[name])
    return adapter


def open_adapter(directory: Path, model: Decoder) -> Adapter:
    """An adapter where it lies: mapped, in the dtype of its file, widened where it is used.

    Args:
        directory: a PEFT adapter directory.
        model: the model it must fit.

    Returns:
        The adapter, whose parameters are not to be written to.

    Raises:
        AdapterError: as in `load_adapter`.
    """
    raw = _read_config(directory)
    weights = _map_weights(directory / WEIGHTS_FILE)
    config = _lora_config(directory, raw, weights, model.spec.linears)
    try:
        expected = adapter_shapes(model.spec, config)
    except ConfigError as error:
        raise AdapterError(f"{directory / CONFIG_FILE}: {error}") from error
    problems = [f"missing: {n} {list(s)}" for n, s in expected.items() if n not in weights]
    for name, tensor in weights.items():
        if name not in expected:
            problems.append(f"not in this model: {name} {list(tensor.shape)}")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(
                f"wrong shape: {name} is {list(tensor.shape)}, the model needs "
                f"{list(expected[name])}"
            )
        elif not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            problems.append(f"holds values that are not finite numbers: {name}")
    if problems:
        base = raw.get("base_model_name_or_path")
        raise AdapterError(
            f"the adapter in {directory} (made for {shown(base)}) does not fit the model in "
            f"{model.path}:\n{listed(problems)}\nGive the model that it was trained on."
        )
    return Adapter(config, {name: weights[name] for name in expected}, model.compute_dtype)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    if not path.is_file():
        found = "has no adapter_config.json" if directory.is_dir() else "is not a directory"
        raise AdapterError(
            f"{directory} {found}; give a PEFT adapter directory ({CONFIG_FILE} and "
            f"{WEIGHTS_FILE}), such as `lowtide train` writes."
        )
    if (size := path.stat().st_size) > MOST_CONFIG_BYTES:
        raise AdapterError(f"{path} has {size:,} bytes; no adapter's settings take so many.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise AdapterError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise AdapterError(f"{path} holds {type(raw).__name__}, not an object.")
    return raw


def _map_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        if pickled.is_file():
            raise AdapterError(
                f"{pickled} is pickled, and reading it can run code hidden in it, so lowtide "
                "refuses it. Load it with PEFT and save it again with safe_serialization=True."
            )
        raise AdapterError(f"{path.parent} has no {path.name}; the adapter is not complete.")
    try:
        with safe_open(str(path), framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise AdapterError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read: {error}. The file is "
            "truncated or corrupt."
        ) from error


def _lora_config(
    directory: Path,
    raw: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    linears: Sequence[str],
) -> LoraConfig:
    """Settings from adapter_config.json; which linears are adapted, from the tensors' names."""
    problems = []
    if raw.get("peft_type") != "LORA":
        problems.append(f"peft_type = {shown(raw.get('peft_type'))} (supported: 'LORA')")
    for name, plain in _PLAIN.items():
        if name in raw and raw[name] not in plain:
            problems.append(f"{name} = {shown(raw[name])} (supported: {plain[0]!r})")
    names = raw.get("target_modules")
    if isinstance(names, list) and not all(isinstance(name, str) for name in names):
        problems.append(f"target_modules = {shown(names)} (supported: names of linears)")
    if problems:
        raise AdapterError(
            f"{directory / CONFIG_FILE} asks for what lowtide does not support:\n{listed(problems)}"
        )
    if not isinstance(names, list) or not names:
        matches = [match for name in weights if (match := _NAME.fullmatch(name))]
        found = {match[2] for match in matches}
        names = [linear for linear in linears if linear in found] or sorted(found)
    try:
        layers = _layers(raw.get("layers_to_transform"))
        names, layers = _targets(names, layers)
        return LoraConfig(
            r=raw.get("r", 8),
            lora_alpha=raw.get("lora_alpha", 8),
            lora_dropout=raw.get("lora_dropout", 0.0),
            target_modules=names,
            layers_to_transform=layers,
            use_rslora=raw.get("use_rslora", False),
            use_dora=raw.get("use_dora", False),
            rank_pattern=_pattern(raw, "rank_pattern"),
            alpha_pattern=_pattern(raw, "alpha_pattern"),
        )
    except ConfigError as error:
        raise AdapterError(f"{directory / CONFIG_FILE}: {error}") from error


def _pattern(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = raw.get(name)
    return {} if value is None else value


def _targets(
    names: list[Any], layers: tuple[int, ...] | None
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Linears and layers; PEFT writes `all-linear` as full module names where they are few."""
    texts = tuple(str(name) for name in names)
    full = [match for name in texts if (match := _MODULE.fullmatch(name))]
    if not full:
        return texts, layers
    pairs = {(int(match[1]), match[2]) for match in full}
    found = tuple(sorted({layer for layer, _ in pairs}))
    linears = tuple(sorted({linear for _, linear in pairs}))
    if len(full) < len(texts) or len(pairs) < len(found) * len(linears) or layers is not None:
        raise ConfigError(
            f"target_modules lists {len(texts)} modules that are not the same linears in each of "
            f"the layers {list(found)}; lowtide adapts the same linears in every adapted layer."
        )
    return linears, found


def _layers(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    layers = [value] if isinstance(value, int) else value
    if not isinstance(layers, list) or not all(isinstance(one, int) for one in layers):
        raise ConfigError(f"layers_to_transform is {shown(value)}; expected whole numbers.")
    return tuple(layers)
