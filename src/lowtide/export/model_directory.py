"""Write a model's tensors as a Hugging Face directory, streamed: safetensors, index, config."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowtide.errors import ConfigError, ModelError, listed
from lowtide.model.decoder import Decoder
from lowtide.model.families import read_config
from lowtide.model.side_files import CONFIG_FILE, side_files
from lowtide.model.spec import FINAL_NORM
from lowtide.weights.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, dtype_name
from lowtide.weights.manifest import STORAGE_KEY
from lowtide.weights.places import read_places
from lowtide.weights.writer import pieces, safetensors_header, tensor_bytes, write_synced

from .merged import Merged

SHARD_BYTES = 5_000_000_000
"""A model that does not come as safetensors is cut into files of at most so many bytes."""

Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass
class Rounding:
    """What storing a tensor changed.

    Attributes:
        update: norm of what the adapter changed, squared.
        error: norm of what rounding changed after that, squared.
        finite: whether all values are finite numbers before rounding, and after.
    """

    update: float = 0.0
    error: float = 0.0
    finite: tuple[bool, bool] = (True, True)

    @property
    def relative(self) -> float | None:
        """Error over update; None where the adapter changes nothing."""
        return (self.error / self.update) ** 0.5 if self.update else None


@dataclass
class ModelWriter:
    """Writes the tensors of a model and an adapter to safetensors files.

    Attributes:
        model: the base, from which files, order and dtypes are taken.
        merged: what is written.
        dtype: of all tensors; None keeps each tensor's, and gives those of a quantised model the
            dtype of its norms, which is that of the model it was made of. From a GGUF file it is
            the dtype of the matrices, bfloat16 where they are quantised.
        roundings: of the tensors that were written.
    """

    model: Decoder
    merged: Merged
    dtype: torch.dtype | None
    roundings: dict[str, Rounding] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Lay out the files."""
        if self.dtype is None and not self.model.checkpoint.is_plain:
            self.dtype = _usual_dtype(self.model)
        self.shards = self._shards()

    @property
    def nbytes(self) -> int:
        """Of all files that will be written."""
        weights = sum(len(safetensors_header(e)) + _tensor_bytes(e) for e in self.shards.values())
        return weights + sum(path.stat().st_size for path in side_files(self.model.directory))

    def dtypes(self) -> list[str]:
        """Names of the dtypes that are written."""
        found = {dtype for entries in self.shards.values() for dtype, _ in entries.values()}
        return sorted(dtype_name(dtype) for dtype in found)

    def write(self, directory: Path) -> None:
        """Write everything, each file flushed to the disk.

        Args:
            directory: empty.

        Raises:
            ConfigError: weights are too large for the dtype.
            ModelError: weights are not finite numbers.
            OSError: the disk is full.
        """
        for name, entries in self.shards.items():  # a disk that is too full says so now
            with open(directory / name, "wb") as file:
                os.posix_fallocate(
                    file.fileno(), 0, len(safetensors_header(entries)) + _tensor_bytes(entries)
                )
        for name, entries in self.shards.items():
            with open(directory / name, "r+b") as file:
                for part in self._parts(entries):
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
        self._refuse_numbers_that_are_none()
        for path in side_files(self.model.directory):
            write_synced(directory / path.name, pieces(path))
        write_synced(directory / CONFIG_FILE, [self._config()])
        if list(self.shards) != [SINGLE_FILE]:
            write_synced(directory / INDEX_FILE, [self._index()])

    def _shards(self) -> dict[str, Entries]:
        """Tensors by file: as in the base, or cut where that is no safetensors of plain tensors."""
        shapes = self.merged.shapes
        entries: Entries = {name: (self._dtype_of(name), shape) for name, shape in shapes.items()}
        if not self.model.checkpoint.is_plain:
            return _cut(entries)
        shards: dict[str, Entries] = {}
        for path in self.model.checkpoint.files:
            held = {name: entries.pop(name) for name in read_places(path) if name in entries}
            if held:
                shards[path.name] = held
        return shards

    def _dtype_of(self, name: str) -> torch.dtype:
        return self.dtype or self.model.checkpoint[name].dtype

    def _parts(self, entries: Entries) -> Iterator[bytes | memoryview]:
        yield safetensors_header(entries)
        for name, (dtype, _) in entries.items():
            rounding = self.roundings[name] = Rounding()
            for tile in self.merged.tiles(name):
                rounded = tile.merged.to(dtype)
                _note(rounding, tile.base, tile.merged, rounded)
                yield tensor_bytes(rounded)

    def _refuse_numbers_that_are_none(self) -> None:
        bad = [name for name, one in self.roundings.items() if not one.finite[0]]
        if bad:
            raise ModelError(
                f"weights are not finite numbers with the adapter on them:\n{listed(bad)}\nThe "
                "model's own weights are damaged, or under DoRA a row of them is zero. Download "
                "the model again, and see with `lowtide eval` that the adapter is what it should "
                "be."
            )
        large = [name for name, one in self.roundings.items() if not one.finite[1]]
        if large:
            raise ConfigError(
                f"{'/'.join(self.dtypes())} cannot hold weights as large as some in these "
                f"tensors:\n{listed(large)}\nGive --dtype bfloat16 or float32."
            )

    def _config(self) -> bytes:
        """config.json, byte for byte where the weights' dtypes stay."""
        path = self.model.directory / CONFIG_FILE
        if self.dtype is None:
            return path.read_bytes()
        config = read_config(self.model.directory)
        if STORAGE_KEY in (config.get("quantization_config") or {}):
            del config["quantization_config"]
        name = dtype_name(self.dtype)
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                keys = [key for key in ("dtype", "torch_dtype") if key in part] or ["torch_dtype"]
                part.update(dict.fromkeys(keys, name))
        return (json.dumps(config, indent=2) + "\n").encode()

    def _index(self) -> bytes:
        own = self.model.directory / INDEX_FILE
        document: dict[str, Any] = json.loads(own.read_bytes()) if own.is_file() else {}
        metadata = document.get("metadata")
        document = {
            "metadata": {
                **(metadata if isinstance(metadata, dict) else {}),
                "total_size": sum(map(_tensor_bytes, self.shards.values())),
            },
            "weight_map": dict(
                sorted((name, file) for file, held in self.shards.items() for name in held)
            ),
        }
        return (json.dumps(document, indent=2) + "\n").encode()


def _usual_dtype(model: Decoder) -> torch.dtype:
    """Of a model whose weights are not written as they lie: its own as far as there is one."""
    if isinstance(model.checkpoint, Checkpoint):
        return model.checkpoint[FINAL_NORM].dtype
    first = f"model.layers.0.{model.spec.linears[0]}.weight"  # norms are float32 in any GGUF file
    plain = first in model.checkpoint
    return getattr(torch, model.checkpoint.stored_as(first)) if plain else torch.bfloat16


def _note(rounding: Rounding, base: Tensor, merged: Tensor, rounded: Tensor) -> None:
    if merged is not base:
        rounding.update += float((merged - base).square_().sum())
        rounding.error += float((rounded.double() - merged).square_().sum())
    before, after = rounding.finite
    rounding.finite = (
        before and bool(merged.isfinite().all()),
        after and bool(rounded.isfinite().all()),
    )


def _tensor_bytes(entries: Entries) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in entries.values())


def _cut(entries: Entries) -> dict[str, Entries]:
    """Files of at most SHARD_BYTES, in the model's order, under transformers' names."""
    parts: list[Entries] = []
    room = 0
    for name, entry in entries.items():
        size = _tensor_bytes({name: entry})
        if not parts or size > room:
            parts.append({})
            room = SHARD_BYTES
        parts[-1][name] = entry
        room -= size
    if len(parts) == 1:
        return {SINGLE_FILE: parts[0]}
    total = len(parts)
    return {
        f"model-{number:05}-of-{total:05}.safetensors": part
        for number, part in enumerate(parts, start=1)
    }
