"""What `lowtide quantize` wrote, and of what: the file beside quantised weights.

Opening a model compares the file's size and header with it, which costs nothing; `verify` reads
every byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lowtide.errors import ModelError, listed

from .places import read_header, read_places
from .storages import STORAGES
from .storages.base import Quantizer
from .writer import write_atomically

MANIFEST_FILE = "lowtide_quantization.json"
PARTIAL_FILE = "model.safetensors.partial"
STORAGE_KEY = "lowtide_storage"
"""What names the storage in a file's metadata and in config.json's quantization_config.

The latter has no `quant_method`: transformers refuses it then, where it skips a method that it does
not know and starts from random weights.
"""
_FORMAT = 1
_REMEDY = "Run `lowtide quantize` again."


_UNREADABLE = (ValueError, RecursionError, KeyError, TypeError, AttributeError, OSError)


@dataclass(frozen=True)
class SourceFile:
    """A file that was quantised: what it held, and how to tell cheaply that it still does."""

    name: str
    bytes: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> SourceFile:
        """Read the whole file.

        Args:
            path: a file.

        Returns:
            Its name, size, time and checksum.

        Raises:
            ModelError: it cannot be read.
        """
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
        return cls(path.name, status.st_size, status.st_mtime_ns, digest)

    def untouched(self, path: Path) -> bool:
        """Whether the file has the same name, size and time; it is not read."""
        status = path.stat()
        return (path.name, status.st_size, status.st_mtime_ns) == (
            self.name,
            self.bytes,
            self.mtime_ns,
        )


@dataclass(frozen=True)
class Manifest:
    """The record of a quantised model.

    Attributes:
        storage: one of `storages.STORAGES`.
        source: the weight files that were quantised.
        weights_bytes: size of the quantised file.
        header_sha256: checksum of its safetensors header.
        checksums: SHA-256 by name of every tensor in it.
        relative_rms_errors: by name of every matrix of the model, the norm of what quantising
            changed over the norm of the matrix.
    """

    storage: str
    source: tuple[SourceFile, ...]
    weights_bytes: int
    header_sha256: str
    checksums: dict[str, str]
    relative_rms_errors: dict[str, float]

    @property
    def kind(self) -> Quantizer:
        """The storage itself."""
        return STORAGES[self.storage]

    @classmethod
    def find(cls, directory: Path) -> Manifest | None:
        """Read the manifest of a model directory.

        Args:
            directory: any model directory.

        Returns:
            The manifest; None where the model is not quantised.

        Raises:
            ModelError: the manifest is damaged or of a version that is not known.
        """
        path = directory / MANIFEST_FILE
        if not path.exists():
            return None
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            if held.pop("format") != _FORMAT or held["storage"] not in STORAGES:
                raise ValueError("its format or storage is not known to this version of lowtide")
            source = tuple(SourceFile(**one) for one in held.pop("source"))
            found = cls(source=source, **held)
            _require_types(found)
            for one in source:
                _require_types(one)
            return found
        except _UNREADABLE as error:
            raise ModelError(f"{path} cannot be used ({error}). {_REMEDY}") from error

    def write(self, directory: Path) -> None:
        """Write it to a model directory.

        Args:
            directory: where the weights lie.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        document: dict[str, Any] = {"format": _FORMAT, **asdict(self)}
        text = json.dumps(document, indent=1) + "\n"
        write_atomically(directory / MANIFEST_FILE, [text.encode()])

    def check_weights(self, path: Path) -> None:
        """Compare the size and the header of the quantised file with what was written.

        Args:
            path: the safetensors file.

        Raises:
            ModelError: it is truncated, or another file.
        """
        size = path.stat().st_size if path.is_file() else 0
        if size != self.weights_bytes:
            raise ModelError(
                f"{path} has {size:,} bytes and {MANIFEST_FILE} beside it says "
                f"{self.weights_bytes:,}: it is truncated, or another file. {_REMEDY}"
            )
        if hashlib.sha256(read_header(path)).hexdigest() != self.header_sha256:
            raise ModelError(
                f"{path} is not the file of which {MANIFEST_FILE} beside it tells: its header has "
                f"another checksum. {_REMEDY}"
            )

    def verify(self, path: Path) -> None:
        """Compare every tensor's checksum with the manifest's.

        Args:
            path: the safetensors file.

        Raises:
            ModelError: names the tensors that are not as they were written.
        """
        self.check_weights(path)
        with open(path, "rb") as file:
            damaged = [
                name
                for name, place in read_places(path).items()
                if place.sha256(file.fileno()) != self.checksums.get(name)
            ]
        if damaged:
            raise ModelError(
                f"{path} is damaged: {len(damaged)} of {len(self.checksums)} tensors are not as "
                f"they were written:\n{listed(damaged)}\n{_REMEDY}"
            )

    def matching(self, files: Sequence[Path]) -> Manifest | None:
        """Whether these are the files that were quantised, byte for byte.

        Files of the same name, size and time are not read again.

        Args:
            files: weight files of a model.

        Returns:
            The manifest with the files' present times; None where one was changed, is missing or
            is new.

        Raises:
            ModelError: a file cannot be read.
        """
        if [path.name for path in files] != [one.name for one in self.source]:
            return None
        now = tuple(
            one if one.untouched(path) else SourceFile.of(path)
            for one, path in zip(self.source, files, strict=True)
        )
        if [one.sha256 for one in now] != [one.sha256 for one in self.source]:
            return None
        return replace(self, source=now)


def _require_types(record: SourceFile | Manifest) -> None:
    """Refuse values of other types than the fields'; what `**` was given need not fit them."""
    kinds = {"str": str, "int": int, "dict": dict, "tuple": tuple}
    wrong = [
        one.name
        for one in fields(record)
        if type(getattr(record, one.name)) is not kinds[str(one.type).partition("[")[0]]
    ]
    if isinstance(record, Manifest) and not wrong:
        errors = record.relative_rms_errors.values()
        wrong = [] if all(isinstance(one, float | int) for one in errors) else ["errors"]
    if wrong:
        raise ValueError(f"of another type than it was written with: {', '.join(wrong)}")
