"""A quantised model, and an ordinary one that stores its dequantised weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lowtide.model.quantized import quantize_model

FILE = "model.safetensors"


def dequantized(parts: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A matrix from what the file holds, column by column."""
    if f"{name}.int8" in parts:
        return parts[f"{name}.int8"].double() * parts[f"{name}.scales"].double()
    packed, scales = parts[f"{name}.int4"].int(), parts[f"{name}.scales"].double()
    zeros = parts.get(f"{name}.zeros")
    groups, half = scales.shape[1], packed.shape[1]
    size = half // -(-groups // 2)
    out = torch.empty(shape, dtype=torch.float64)
    for col in range(shape[1]):
        q = packed[:, col % half] >> (4 if col >= half else 0) & 15
        q = (q - 16 * (q >= 8)).double()
        if zeros is not None:
            q = q - zeros[:, col // size]
        out[:, col] = q * scales[:, col // size]
    return out


def quantized_and_plain(source: Path, root: Path, storage: str) -> tuple[Path, Path]:
    """Write both into `root`; float32 holds every dequantised value exactly, or this fails."""
    quantize_model(str(source), root / "quantized", storage)
    parts, plain = load_file(root / "quantized" / FILE), root / "plain"
    plain.mkdir()
    (plain / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {}
    for name, tensor in load_file(source / FILE).items():
        tensors[name] = tensor
        if tensor.dim() == 2:
            exact = dequantized(parts, name, tuple(tensor.shape))
            tensors[name] = exact.float()
            assert tensors[name].double().equal(exact)
    save_file(tensors, plain / FILE, metadata={"format": "pt"})
    return root / "quantized", plain
