"""The header of a GGUF file: its metadata, and where its tensors lie.

A header may hold a vocabulary of a quarter million words, which nobody needs while a model is
trained: arrays are noted where they lie, and read when they are asked for. Every count, length and
offset is compared with the bytes that there are before anything is made of it.

The format: magic, version, number of tensors, number of keys; for each key its name, type and
value; for each tensor its name, dimensions (columns first), type and offset; all little-endian.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lowtide.errors import ModelError, shown

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
            11: "<q", 12: "<d"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_ALIGNMENT_KEY, _ALIGNMENT = "general.alignment", 32
_MOST_ENTRIES, _MOST_ITEMS, _MOST_DIMENSIONS = 1 << 16, 1 << 24, 4
_LONGEST_NAME, _LONGEST_TEXT = 1 << 16, 1 << 24
_LARGEST = 1 << 48
"""Elements of a tensor; no file system holds as many."""


class TensorInfo(NamedTuple):
    """A tensor as the header describes it.

    Attributes:
        shape: rows first, as in torch.
        number: of the type of its numbers.
        start: of its first byte in the file.
    """

    shape: tuple[int, ...]
    number: int
    start: int


class _Array(NamedTuple):
    """An array of the metadata, not read yet: of which kind, how many, and in which bytes."""

    kind: int
    items: int
    start: int
    stop: int


class Metadata(Mapping[str, Any]):
    """The keys of a header with their values; arrays become lists when they are asked for."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        """Wrap what was read of `path`."""
        self._path, self._values = path, values

    def __getitem__(self, key: str) -> Any:
        """A number, a boolean, a string, or a list of one kind of these."""
        value = self._values[key]
        return self._read(key, value) if isinstance(value, _Array) else value

    def __contains__(self, key: object) -> bool:
        """Whether there is such a key; nothing is read for it."""
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        """The keys."""
        return iter(self._values)

    def __len__(self) -> int:
        """How many keys there are."""
        return len(self._values)

    def _read(self, key: str, array: _Array) -> list[Any]:
        with open(self._path, "rb") as file:
            file.seek(array.start)
            held = file.read(array.stop - array.start)
        if len(held) < array.stop - array.start:
            raise ModelError(f"{self._path} was cut short while it was read. Copy it again.")
        if array.kind != _STRING:
            return [value for (value,) in struct.iter_unpack(_SCALARS[array.kind], held)]
        cursor = _Cursor(self._path, held)
        return [cursor.string(key) for _ in range(array.items)]


@dataclass(frozen=True)
class Header:
    """What the header of one file says.

    Attributes:
        path: of the file.
        metadata: its keys.
        tensors: by their names in the file.
        digest: SHA-256 of the header, in hexadecimal.
        nbytes: of the file.
    """

    path: Path
    metadata: Metadata
    tensors: dict[str, TensorInfo]
    digest: str
    nbytes: int

    @classmethod
    def read(cls, path: Path) -> Header:
        """Read and check a header; no tensor is read.

        Args:
            path: a file.

        Returns:
            The header.

        Raises:
            ModelError: it cannot be read, is no GGUF file, is of a version or byte order that is
                not read here, or contradicts itself.
        """
        try:
            with open(path, "rb") as file:
                if file.read(len(_MAGIC)) != _MAGIC:
                    raise ModelError(
                        f"{path} is not a GGUF file: it does not begin with {_MAGIC.decode()}. "
                        "Give a .gguf file, a model directory or a Hugging Face hub id."
                    )
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
                    return cls._parsed(path, held)
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}.") from error

    @classmethod
    def _parsed(cls, path: Path, held: mmap.mmap) -> Header:
        cursor = _Cursor(path, held, len(_MAGIC))
        _check_version(path, cursor.scalar(4))
        counts = cursor.scalar(10), cursor.scalar(10)
        if max(counts) > _MOST_ENTRIES:
            raise cursor.broken(
                f"it says that it holds {counts[0]:,} tensors and {counts[1]:,} keys"
            )
        values: dict[str, Any] = {}
        for _ in range(counts[1]):
            key = cursor.string("a key", _LONGEST_NAME)
            if key in values:
                raise cursor.broken(f"the key {shown(key)} is there twice")
            values[key] = cursor.value(key)
        tensors: dict[str, TensorInfo] = {}
        for _ in range(counts[0]):
            name = cursor.string("a tensor's name", _LONGEST_NAME)
            if name in tensors:
                raise cursor.broken(f"the tensor {shown(name)} is there twice")
            tensors[name] = cursor.tensor(name)
        align = values.get(_ALIGNMENT_KEY, _ALIGNMENT)
        if not isinstance(align, int) or not 8 <= align <= 1 << 20 or align & (align - 1):
            raise cursor.broken(
                f"{_ALIGNMENT_KEY} is {shown(align)}, which is no power of two from 8"
            )
        data = -(-cursor.at // align) * align
        for name, one in tensors.items():
            if one.start % align:
                raise cursor.broken(
                    f"the tensor {shown(name)} begins at {one.start:,}, no multiple of {align}"
                )
            tensors[name] = one._replace(start=data + one.start)
        digest = hashlib.sha256(memoryview(held)[: cursor.at]).hexdigest()
        return cls(path, Metadata(path, values), tensors, digest, len(held))


class _Cursor:
    """Reads one thing after another, and never beyond the end."""

    def __init__(self, path: Path, held: bytes | mmap.mmap, at: int = 0) -> None:
        self._path, self._held = path, held
        self.at = at

    def broken(self, what: str) -> ModelError:
        """The error of a file that is not as it should be."""
        return ModelError(
            f"{self._path} ({len(self._held):,} bytes) is a damaged GGUF file: {what}. Download or "
            "make it again."
        )

    def _take(self, count: int, what: str) -> int:
        """Where `count` bytes begin that there are; they count as read."""
        start = self.at
        if count > len(self._held) - start:
            raise self.broken(
                f"it ends in {what}, which needs {count:,} bytes, and {len(self._held) - start:,} "
                "are left"
            )
        self.at += count
        return start

    def scalar(self, kind: int, what: str = "its header") -> Any:
        """A number or a boolean."""
        form = _SCALARS[kind]
        return struct.unpack_from(form, self._held, self._take(struct.calcsize(form), what))[0]

    def string(self, what: str, longest: int = _LONGEST_TEXT) -> str:
        """Text."""
        count = self.scalar(10, what)
        if count > longest:
            raise self.broken(f"the length of {what} is {count:,} bytes")
        start = self._take(count, what)
        try:
            return str(self._held[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise self.broken(f"{what} is not text in UTF-8") from error

    def value(self, key: str) -> Any:
        """What a key has: a scalar, a string, or an array, which is passed over."""
        kind = self.scalar(4, key)
        if kind == _STRING:
            return self.string(key)
        if kind != _ARRAY:
            self._require_kind(kind, key)
            return self.scalar(kind, key)
        kind, count = self.scalar(4, key), self.scalar(10, key)
        if kind != _STRING:
            self._require_kind(kind, key)
        if count > _MOST_ITEMS:
            raise self.broken(f"{shown(key)} has {count:,} items")
        start = self.at
        if kind == _STRING:
            self._skip_strings(count, key)
        else:
            self._take(count * struct.calcsize(_SCALARS[kind]), key)
        return _Array(kind, count, start, self.at)

    def _require_kind(self, kind: int, key: str) -> None:
        if kind not in _SCALARS:
            raise self.broken(f"{shown(key)} has values of the type {kind}, which does not exist")

    def _skip_strings(self, count: int, key: str) -> None:
        """Pass over strings: a vocabulary has a quarter million."""
        at, last, held = self.at, len(self._held) - 8, self._held
        length = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at > last:
                break
            at += 8 + length(held, at)[0]
        else:
            if at <= last + 8:
                self.at = at
                return
        raise self.broken(f"it ends in {shown(key)}, an array of {count:,} strings")

    def tensor(self, name: str) -> TensorInfo:
        """A tensor's dimensions, type, and its offset from where the tensors begin."""
        what = f"the tensor {shown(name)}"
        count = self.scalar(4, what)
        if not 1 <= count <= _MOST_DIMENSIONS:
            raise self.broken(f"{what} has {count:,} dimensions")
        shape = tuple(self.scalar(10, what) for _ in range(count))[::-1]
        if min(shape) == 0 or math.prod(shape) > _LARGEST:
            raise self.broken(f"{what} has the shape {list(shape)}")
        number, start = self.scalar(4, what), self.scalar(10, what)
        return TensorInfo(shape, number, start)


def _check_version(path: Path, version: int) -> None:
    if version in _VERSIONS:
        return
    if version & 0xFFFF == 0:
        raise ModelError(
            f"{path} is a big-endian GGUF file, and lowtide reads little-endian ones. Download the "
            "little-endian file, or convert it with gguf-convert-endian of the gguf package."
        )
    known = " and ".join(map(str, _VERSIONS))
    remedy = "Make it again with a current llama.cpp." if version < 2 else "Use a newer lowtide."
    raise ModelError(f"{path} is a GGUF file of version {version}; lowtide reads {known}. {remedy}")
