"""Made-up GGUF files, any type for each matrix; and the model of what they unpack to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from torch import Tensor

from lowtide.model.gguf.write import gguf_model
from lowtide.weights.writer import write_safetensors

Array = NDArray[np.generic]
KindOf = Callable[[str, tuple[int, ...]], str]
"""The type of a matrix, by its name in the file and its shape."""
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
PLAIN = ("F32", "F16", "BF16")
TYPES = (*PLAIN, "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")


def fitting(kind: str, columns: int) -> str:
    """What llama.cpp takes where rows do not divide into a type's blocks."""
    if kind in _FALLBACK and columns % 256:
        kind = _FALLBACK[kind]
    return "F16" if kind not in PLAIN and columns % 32 else kind


def all_in(kind: str) -> KindOf:
    """Every matrix in one type, as far as its rows fit."""
    return lambda name, shape: fitting(kind, shape[1])


def write(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    kind_of: KindOf,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Write a model; returns what its tensors unpack to, by Hugging Face name."""
    model = gguf_model(config)
    writer = GGUFWriter(path, model.architecture)
    for key, value in {**model.metadata, "tokenizer.ggml.model": "none", **(more or {})}.items():
        add(writer, key, value)
    for name, vector in model.vectors.items():
        writer.add_tensor(name, vector.numpy())
    unpacked = {}
    for name, there in model.tensors.items():
        values = permuted(tensors[name].float().numpy(), there.heads) + np.float32(there.offset)
        kind = kind_of(there.name, there.shape) if values.ndim == 2 else "F32"
        raw = packed(values, kind)
        writer.add_tensor(
            there.name, raw, raw_shape=raw.shape, raw_dtype=GGMLQuantizationType[kind]
        )
        back = restored(numbers(raw, kind).reshape(values.shape), there.heads)
        unpacked[name] = torch.from_numpy(back - np.float32(there.offset))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unpacked


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    """A key, typed by its value."""
    if key == "general.architecture":
        return
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
             str: writer.add_string, list: writer.add_array}  # fmt: skip
    kinds[type(value)](key, value)


def permuted(values: Array, heads: int) -> Array:
    """Rows as llama.cpp's converter puts them: `LlamaModel.permute` of convert_hf_to_gguf.py."""
    if not heads:
        return values
    shape = values.shape
    cut = values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return np.ascontiguousarray(cut.swapaxes(1, 2).reshape(shape))


def restored(values: Array, heads: int) -> Array:
    """The way back."""
    if not heads:
        return np.ascontiguousarray(values)
    shape = values.shape
    cut = values.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
    return np.ascontiguousarray(cut.swapaxes(1, 2).reshape(shape))


def packed(values: Array, kind: str) -> Array:
    """Numbers as a file holds them. The package cannot make K types: random bytes, whose scales
    give weights of about the same size."""
    if kind == "BF16":
        return gguf.quants.quantize(values, GGMLQuantizationType.BF16)
    if not kind.endswith("_K"):
        return gguf.quants.quantize(values, GGMLQuantizationType[kind])
    rows, columns = values.shape
    random = np.random.default_rng(rows * columns)
    size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    raw = random.integers(0, 256, (rows, columns // 256, size), dtype=np.uint8)
    # d, and where there are minima d times half the largest integer, so that the mean is 0.
    spread = float(values.std()) + 1e-9
    levels = {"Q4_K": 15, "Q5_K": 31, "Q6_K": 63}[kind]
    d = np.float16(spread / (levels * (22 if kind == "Q6_K" else 12)))
    scales = np.array([d, np.float16(d * levels / 2)], np.float16).view(np.uint8)
    if kind == "Q6_K":
        raw[..., 208:210] = scales[:2]
    else:
        raw[..., :4] = scales
    return raw.reshape(rows, -1)


def numbers(raw: Array, kind: str) -> Array:
    """What the package makes of them."""
    return gguf.quants.dequantize(raw, GGMLQuantizationType[kind]).astype(np.float32)


def plain_model(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """A model directory in float32."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    write_safetensors(directory / "model.safetensors", dict(tensors))
    return directory


def random_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights that keep activations of order 1; norms near 1."""
    random = np.random.default_rng(5)
    found = {}
    for name, shape in shapes.items():
        noise = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
        if "norm" in name:
            found[name] = 1 + 0.3 * noise
        else:
            scale = 0.3 if len(shape) == 1 or "embed" in name else shape[1] ** -0.5
            found[name] = scale * noise
    return found
