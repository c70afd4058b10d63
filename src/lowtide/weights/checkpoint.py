"""A Hugging Face checkpoint: safetensors files, single or sharded, mapped and checked.

Only headers are read when a checkpoint is opened. Pickled weights are refused: reading them could
run code that the file contains. In a checkpoint that `lowtide quantize` wrote, every matrix is
stored as the parts of a `storages.Storage`, named after it (`NAME.int4`, `NAME.scales`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowtide.errors import ModelError, listed

from .base import Weights
from .manifest import MANIFEST_FILE, STORAGE_KEY, Manifest
from .matrix import MappedMatrix, StoredMatrix
from .storages.base import QuantizedMatrix, Quantizer

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


class Checkpoint(Weights):
    """The tensors of a model directory by Hugging Face name, on mapped memory."""

    kind = "safetensors"

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, Tensor],
        files: list[Path],
        storage: Quantizer | None = None,
    ) -> None:
        """Wrap already opened tensors; use `Checkpoint.open`."""
        super().__init__(files)
        self.directory = directory
        self.storage = storage
        self.is_plain = storage is None
        self._tensors = tensors

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Map every tensor of the checkpoint.

        Args:
            directory: a model directory with `model.safetensors` or an index and its shards.

        Returns:
            The opened checkpoint; no weight has been read yet.

        Raises:
            ModelError: a file is missing, truncated, corrupt, pickled, or changed since
                `lowtide quantize` wrote it.
        """
        files = weight_files(directory)
        manifest = Manifest.find(directory)
        if manifest is not None:
            manifest.check_weights(directory / SINGLE_FILE)
        tensors: dict[str, Tensor] = {}
        for path in files:
            found, storage = _map_file(path)
            tensors.update(found)
            if storage is not None and manifest is None:
                raise ModelError(
                    f"{path} holds {storage} weights and there is no {MANIFEST_FILE} beside it: "
                    "the directory was not finished, or not copied whole. Run `lowtide quantize` "
                    "again."
                )
        _check_index(directory, tensors)
        return cls(directory, tensors, files, None if manifest is None else manifest.kind)

    def __getitem__(self, name: str) -> Tensor:
        """The stored tensor of that name."""
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        """Whether a tensor of that name is stored as it is."""
        return name in self._tensors

    def stored_as(self, name: str) -> str:
        """The storage or the dtype of a tensor, by name."""
        if name not in self._tensors and self.storage is not None:
            return self.storage.name
        return dtype_name(self._tensors[name].dtype)

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor, or of the parts that a quantised matrix is stored as."""
        parts = [name] if name in self._tensors else self._parts(name)
        return sum(self._tensors[part].nbytes for part in parts)

    def _parts(self, name: str) -> list[str]:
        """What a quantised matrix is stored as."""
        return [other for other in self._tensors if other.rpartition(".")[0] == name]

    def matrix(self, name: str, shape: tuple[int, int], compute_dtype: torch.dtype) -> StoredMatrix:
        """The `(out, in)` matrix of that name, which `check` has found to be there."""
        if self.storage is None:
            return MappedMatrix(self._tensors[name], compute_dtype)
        parts = {part: self._tensors[f"{name}.{part}"] for part in self.storage.entries(shape)}
        return QuantizedMatrix(self.storage, parts, shape, compute_dtype)

    def check(self, expected: Mapping[str, tuple[int, ...]], optional: Iterable[str] = ()) -> None:
        """See `Weights.check`."""
        entries = stored_entries(expected, self.storage)
        problems = [
            f"missing: {name} {list(shape)}"
            for name, (_, shape) in entries.items()
            if name not in self._tensors
        ]
        known = set(entries) | set(optional)
        for name, tensor in self._tensors.items():
            dtype, shape = entries.get(name, (None, ()))
            if name in entries and tuple(tensor.shape) != shape:
                problems.append(
                    f"wrong shape: {name} is {list(tensor.shape)}, config.json asks for "
                    f"{list(shape)}"
                )
            elif name not in known and not name.endswith(_IGNORED_SUFFIXES):
                problems.append(f"extra: {name} {list(tensor.shape)}")
            readable = STORED_DTYPES if dtype is None else (dtype,)
            if name in entries and tensor.dtype not in readable:
                names = " or ".join(map(dtype_name, readable))
                problems.append(f"dtype {dtype_name(tensor.dtype)}: {name} (expected {names})")
        if problems:
            raise ModelError(
                f"the weights in {self.directory} do not fit its config.json:\n"
                f"{listed(problems)}\nCheck that config.json and the weights come from the same "
                "model, and download it again if in doubt."
            )


def stored_entries(
    tensors: Mapping[str, tuple[int, ...]], storage: Quantizer | None
) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """What the tensors of a model are stored as: matrices by parts where there is a storage.

    Args:
        tensors: shape by name.
        storage: of the matrices; None for a model that is not quantised.

    Returns:
        Dtype and shape by name in the file, a tensor's parts together; None is any of
        STORED_DTYPES.
    """
    entries: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
    for name, shape in tensors.items():
        if storage is None or len(shape) != 2:
            entries[name] = (None, shape)
            continue
        for part, entry in storage.entries((shape[0], shape[1])).items():
            entries[f"{name}.{part}"] = entry
    return entries


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`."""
    return str(dtype).removeprefix("torch.")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, the index's shards if there is an index.

    Args:
        directory: a model directory.

    Returns:
        Their paths, sorted.

    Raises:
        ModelError: there are none, an index is broken, or a shard is missing.
    """
    if (directory / INDEX_FILE).is_file():
        names = sorted(set(_read_index(directory).values()))
        escaping = [name for name in names if Path(name).name != name]
        if escaping:
            raise ModelError(
                f"{directory / INDEX_FILE} names files outside its directory: "
                f"{', '.join(escaping)}. Download the model again from a source you trust."
            )
        # os.path says no to names that no file could have; pathlib raises.
        missing = [name for name in names if not os.path.isfile(directory / name)]
        if missing:
            raise ModelError(
                f"{directory} lacks {len(missing)} of {len(names)} weight files:\n"
                f"{listed(missing)}\nDownload them again."
            )
        return [directory / name for name in names]
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    pickled = sorted(
        p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(pattern)
    )
    if pickled:
        raise ModelError(
            f"{directory} holds pickled weights ({', '.join(pickled[:3])}), and reading those can "
            "run code hidden in the file, so lowtide refuses them. Convert once with transformers: "
            f"AutoModelForCausalLM.from_pretrained({str(directory)!r})"
            ".save_pretrained('converted', safe_serialization=True)"
        )
    others = sorted(p.name for p in directory.glob("*.safetensors"))
    found = f" (found only {', '.join(others)})" if others else ""
    raise ModelError(
        f"{directory} has no {SINGLE_FILE} and no {INDEX_FILE}{found}. Give a model directory as "
        "downloaded from the Hugging Face hub."
    )


def _read_index(directory: Path) -> dict[str, str]:
    path = directory / INDEX_FILE
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
            raise TypeError("weight_map must map tensor names to file names")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} is not a safetensors index ({error}). Download it again."
        ) from error
    return dict(weight_map)


def _check_index(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """A tensor that the index promises and no shard holds is a truncated download."""
    if not (directory / INDEX_FILE).is_file():
        return
    absent = sorted(name for name in _read_index(directory) if name not in tensors)
    if absent:
        raise ModelError(
            f"{directory / INDEX_FILE} promises tensors that its files do not hold:\n"
            f"{listed(absent)}\nDownload the model again."
        )


def _map_file(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a file, and the storage that its metadata names."""
    try:
        with safe_open(str(path), framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
            return tensors, (handle.metadata() or {}).get(STORAGE_KEY)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read: {error}. The file is "
            "truncated or corrupt; download it again."
        ) from error
