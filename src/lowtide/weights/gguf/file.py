"""A model's GGUF file, or all parts of one that was split, with the types of its tensors."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowtide.errors import ModelError, listed, shown
from lowtide.weights.storages import BLOCKS
from lowtide.weights.storages.ggml import BlockStorage

from .header import Header, Metadata, TensorInfo

PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Types of floating numbers by their number in a file."""
TYPES = ("F32", "F16", "BF16", *BLOCKS)
"""All types that are read."""
_BY_NUMBER: dict[int, BlockStorage] = {storage.number: storage for storage in BLOCKS.values()}
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_COUNT, _NUMBER, _TENSORS = "split.count", "split.no", "split.tensors.count"
_MOST_PARTS = 4096


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file, whether or not it exists.

    Args:
        path: as the user gave it.

    Returns:
        True for a name that ends in .gguf, and for a file that begins like one.
    """
    if path.is_dir():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except (OSError, ValueError):
        return False


class Extent(NamedTuple):
    """A tensor of known type in one of the parts.

    Attributes:
        part: which file.
        shape: rows first.
        kind: of its numbers: a dtype, or a storage of blocks.
        start: of its first byte.
        nbytes: its length.
    """

    part: int
    shape: tuple[int, ...]
    kind: torch.dtype | BlockStorage
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """What the headers say, checked against the files' sizes.

    Attributes:
        path: as the user gave it.
        headers: of the parts in order; one where the model was not split.
        metadata: of the model.
        extents: of the tensors by their names in the file.
        unknown: names of the types that are not read here, by tensor.
    """

    path: Path
    headers: list[Header]
    metadata: Metadata
    extents: dict[str, Extent]
    unknown: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read the headers of a model.

        Args:
            path: its file, or any part of one that was split.

        Returns:
            What they say.

        Raises:
            ModelError: there is no such file, it is damaged or truncated, or a part is missing.
        """
        if not path.exists():
            raise ModelError(f"there is no file {path}. Check the path of the GGUF file.")
        headers = _all_parts(Header.read(path))
        extents: dict[str, Extent] = {}
        unknown: dict[str, str] = {}
        for part, header in enumerate(headers):
            for name, info in header.tensors.items():
                if name in extents or name in unknown:
                    raise ModelError(
                        f"{header.path} holds the tensor {shown(name)}, and so does an earlier "
                        "part of the model. Download the parts again."
                    )
                kind = PLAIN.get(info.number) or _BY_NUMBER.get(info.number)
                if kind is None:
                    unknown[name] = _type_name(info.number)
                else:
                    extents[name] = _extent(header, name, info, (part, kind))
        return cls(path, headers, headers[0].metadata, extents, unknown)

    @property
    def files(self) -> list[Path]:
        """The files of all parts."""
        return [header.path for header in self.headers]

    @property
    def digest(self) -> str:
        """SHA-256 of the headers, in hexadecimal."""
        return hashlib.sha256(" ".join(one.digest for one in self.headers).encode()).hexdigest()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors by their names in the file, rows first, also of those of unknown types."""
        return {name: one.shape for head in self.headers for name, one in head.tensors.items()}

    def require_known(self) -> None:
        """Refuse a file with tensors of types that are not read here.

        Raises:
            ModelError: names each type, how many tensors have it, and the types that are read.
        """
        if not self.unknown:
            return
        counts = Counter(self.unknown.values())
        raise ModelError(
            f"{self.path} has tensors of types that lowtide does not read:\n"
            f"{listed([f'{kind}: {count} tensors' for kind, count in counts.items()])}\nIt reads "
            f"{', '.join(TYPES)}. Take a file of the same model in one of these, such as Q4_K_M or "
            "Q8_0."
        )

    def vector(self, name: str) -> Tensor:
        """The numbers of a small tensor, read into memory.

        Args:
            name: in the file.

        Returns:
            `shape`, float32.

        Raises:
            ModelError: it is not there, or not of floating numbers.
        """
        found = self.extents.get(name)
        if found is None or not isinstance(found.kind, torch.dtype):
            raise ModelError(
                f"{self.path} has no tensor {shown(name)} of floating numbers. Download it again."
            )
        with open(self.files[found.part], "rb") as file:
            file.seek(found.start)
            held = bytearray(file.read(found.nbytes))
        if len(held) < found.nbytes:
            raise ModelError(f"{self.path} was cut short while it was read. Copy it again.")
        return torch.frombuffer(held, dtype=found.kind).view(found.shape).float()


def _extent(
    header: Header, name: str, info: TensorInfo, kind: tuple[int, torch.dtype | BlockStorage]
) -> Extent:
    """The tensor's place; refuses one that is cut off, or whose rows are not whole blocks."""
    part, of = kind
    size, nbytes = (1, of.itemsize) if isinstance(of, torch.dtype) else (of.size, of.nbytes)
    if info.shape[-1] % size:
        raise ModelError(
            f"{header.path} is a damaged GGUF file: the tensor {shown(name)} is {list(info.shape)} "
            f"in blocks of {size} columns. Download or make it again."
        )
    length = math.prod(info.shape) // size * nbytes
    if info.start + length > header.nbytes:
        raise ModelError(
            f"{header.path} is truncated: it has {header.nbytes:,} bytes, and the tensor "
            f"{shown(name)} ends at {info.start + length:,}. Download it again."
        )
    return Extent(part, info.shape, of, info.start, length)


def _all_parts(given: Header) -> list[Header]:
    """The headers of all parts of a model, by its metadata and its name."""
    said = {key: given.metadata.get(key, default) for key, default in ((_COUNT, 1), (_NUMBER, 0))}
    count, number = said[_COUNT], said[_NUMBER]
    if not all(isinstance(value, int) for value in said.values()) or not (
        0 <= number < max(count, 1) <= _MOST_PARTS
    ):
        raise ModelError(
            f"{given.path} says that it is part {shown(number)}, counted from 0, of "
            f"{shown(count)}. Download it again."
        )
    if count <= 1:
        return [given]
    named = _PART.fullmatch(given.path.name)
    if named is None or (int(named[2]), int(named[3])) != (number + 1, count):
        raise ModelError(
            f"{given.path} is part {number + 1} of a model in {count} files, and its name does not "
            f"end in -{number + 1:05}-of-{count:05}.gguf, by which the others are found. Give the "
            "parts the names that they were made with."
        )
    paths = [given.path.with_name(f"{named[1]}-{i:05}-of-{count:05}.gguf") for i in
             range(1, count + 1)]  # fmt: skip
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ModelError(
            f"{given.path} is one of {count} files of a model, and {len(missing)} of them are not "
            f"beside it:\n{listed(missing)}\nDownload them to the same directory."
        )
    headers = [given if path == given.path else Header.read(path) for path in paths]
    _check_parts(headers)
    return headers


def _check_parts(headers: Sequence[Header]) -> None:
    """Parts that do not belong together, or hold more or fewer tensors than they should."""
    count, total = len(headers), headers[0].metadata.get(_TENSORS)
    for number, header in enumerate(headers):
        found = header.metadata.get(_NUMBER), header.metadata.get(_COUNT)
        if found != (number, count):
            raise ModelError(
                f"{header.path} says that it is part {shown(found[0])}, counted from 0, of "
                f"{shown(found[1])}, where {number} of {count} is expected. Download it again."
            )
    held = sum(len(header.tensors) for header in headers)
    if total is not None and held != total:
        raise ModelError(
            f"{headers[0].path} and the parts beside it hold {held} tensors, and {_TENSORS} says "
            f"{shown(total)}. Download them again."
        )


def _type_name(number: int) -> str:
    """What the `gguf` package calls a type."""
    import gguf

    try:
        return gguf.GGMLQuantizationType(number).name
    except ValueError:
        return f"type {number}"
