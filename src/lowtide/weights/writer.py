"""Write a safetensors file from tensors where they lie, durably and in one piece.

`safetensors.torch.save_file` copies every tensor into Python bytes first and refuses views of one
storage; the adapter is one storage, and a second copy of it would be the peak of a save.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowtide.errors import OutputError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, then rename it.

    Args:
        path: the file; whatever it held stays until the new content is complete.
        tensors: contiguous CPU tensors by name.

    Raises:
        OutputError: the disk is full or the directory cannot be written; nothing is left behind.
    """
    header = safetensors_header({name: (t.dtype, t.shape) for name, t in tensors.items()})
    write_atomically(path, [header, *(tensor_bytes(t) for t in tensors.values())])


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


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write `parts` to a temporary file, fsync, rename over `path`, fsync the directory.

    Args:
        path: the file.
        parts: its content, in order; made one by one as it is written where this is a generator.

    Raises:
        OutputError: the disk is full or the directory cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise  # Ctrl-C among them
        raise OutputError(
            f"{path} cannot be written: {error.strerror}. Free some space or choose another "
            "directory; what was there before is unchanged."
        ) from error
