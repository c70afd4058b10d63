"""Write a safetensors file from tensors where they lie, durably and in one piece.

`safetensors.torch.save_file` copies every tensor into Python bytes first and refuses views of one
storage; the adapter is one storage, and a second copy of it would be the peak of a save.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowtide.errors import OutputError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, then rename it.

    Args:
        path: the file; whatever it held stays until the new content is complete.
        tensors: contiguous CPU tensors by name.

    Raises:
        OutputError: the disk is full or the directory cannot be written; nothing is left behind.
    """
    write_atomically(path, safetensors_parts(tensors))


def safetensors_parts(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The content of a safetensors file, piece by piece: its header, then each tensor's bytes."""
    yield safetensors_header({name: (t.dtype, t.shape) for name, t in tensors.items()})
    for tensor in tensors.values():
        yield tensor_bytes(tensor)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as they lie in a safetensors file; a contiguous one is not copied."""
    return memoryview(tensor.detach().contiguous().view(torch.uint8).numpy().data)


def safetensors_header(
    entries: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """What a safetensors file starts with: its length and the JSON of names, types and offsets.

    Args:
        entries: dtype and shape by name, in the order in which the tensors' bytes follow.
        metadata: what the file says of itself beside its format.

    Returns:
        The first bytes of the file; the tensors' bytes come right after them.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for name, (dtype, shape) in entries.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, start + size],
        }
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Digest:
    """Size and SHA-256 of what is written through it."""

    def __init__(self) -> None:
        """Of nothing yet."""
        self.bytes = 0
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of all that went through, in hexadecimal."""
        return self._hash.hexdigest()

    def of(self, parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        """Pass the parts on, counting and hashing each."""
        for part in parts:
            self._hash.update(part)
            self.bytes += part.nbytes if isinstance(part, memoryview) else len(part)
            yield part


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write `parts` to a temporary file, fsync, rename over `path`, fsync the directory.

    Args:
        path: the file.
        parts: its content, in order; made one by one as it is written where this is a generator.

    Raises:
        OutputError: the disk is full or the directory cannot be written; nothing is left behind.
    """
    temporary = _temporary(path)
    try:
        write_synced(temporary, parts)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a directory that is gone has nothing left to remove
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise  # Ctrl-C among them
        raise OutputError(
            f"{path} cannot be written: {error.strerror}. Free some space or choose another "
            "directory; what was there before is unchanged."
        ) from error


def write_synced(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file and flush it to the disk; its directory entry is not flushed."""
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_atomically(source: Path, path: Path) -> None:
    """Give a file a second name in one step; a copy where the file system has no links.

    Args:
        source: a file that is on the disk already.
        path: its second name, on the same file system; whatever it meant before is replaced.
    """
    temporary = _temporary(path)
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            write_synced(temporary, pieces(source))
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def pieces(path: Path) -> Iterator[bytes]:
    """A file's bytes, a megabyte at a time."""
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            yield piece


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
