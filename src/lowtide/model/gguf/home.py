"""A GGUF file as a model: its weights, and the small files of a model directory in the cache.

config.json, the tokenizer's files and the table of tensors are written once, into a directory that
is named after the header's checksum, by a child process (`unpack`): a vocabulary takes tens of
megabytes to rewrite. From then on that directory and the file's weights are a model like any other.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import lowtide
from lowtide.caches import cache_root
from lowtide.errors import KINDS, LowtideError, ModelError, shown
from lowtide.weights.gguf.file import GgufFile, is_gguf
from lowtide.weights.gguf.weights import GgufWeights, Stored

from .entry import ROPE_TENSORS
from .tensors import row_order

TENSORS_FILE, SUMS_FILE = "gguf.tensors", "gguf.sums"
_FORMAT = 2
_OTHERS = {
    "adapter": "a LoRA adapter, not a model. Give the model that it was made for",
    "mmproj": "the image or audio part of a model. Give the file of its language model",
    "imatrix": "what a quantiser measured of a model. Give the file of the model",
}
"""What a file may be instead of a model, by `general.type`."""


def open_gguf(path: Path) -> tuple[Path, GgufWeights]:
    """Open a model's GGUF file, or all parts of one that was split.

    Args:
        path: the file, or any of the parts.

    Returns:
        A directory with its config.json and tokenizer, and its weights on mapped memory.

    Raises:
        ModelError: there is no such file, it is damaged or truncated, no model, or of a kind that
            is not supported.
        OutputError: the cache cannot be written.
    """
    file = GgufFile.open(path)
    directory = _home(file)
    table = json.loads((directory / TENSORS_FILE).read_text(encoding="utf-8"))
    stored = {
        name: Stored(there, row_order(rows, heads) if heads else None, offset)
        for name, (there, rows, heads, offset) in table.items()
    }
    return directory, GgufWeights(file, stored, ROPE_TENSORS)


def home_of(path: Path) -> Path:
    """Where a model's config.json and tokenizer lie.

    Args:
        path: a model directory, or a GGUF file.

    Returns:
        The directory itself, or the one that the file became.

    Raises:
        ModelError: as `open_gguf`.
        OutputError: as `open_gguf`.
    """
    return _home(GgufFile.open(path)) if is_gguf(path) else path


def _home(file: GgufFile) -> Path:
    """The directory in the cache, made now where it is not there or not as it was written."""
    refuse_others(file)
    home = cache_root() / "gguf" / f"{file.path.stem[:80]}-{_key(file)[:16]}"
    if not is_whole(home):
        unpack_in_child(file.path, home)
    return home


def _key(file: GgufFile) -> str:
    """SHA-256 of all that the directory follows from."""
    digest = hashlib.sha256(f"{_FORMAT} {lowtide.__version__} {file.digest}".encode())
    for name in ROPE_TENSORS:
        if name in file.extents:
            digest.update(file.vector(name).numpy().tobytes())
    return digest.hexdigest()


def is_whole(home: Path) -> bool:
    """Whether a directory has all that `unpack` wrote, as it wrote it.

    Args:
        home: the directory.

    Returns:
        False also where there is none.
    """
    try:
        sums = json.loads((home / SUMS_FILE).read_text(encoding="utf-8"))
        return all(checksum(home / name) == value for name, value in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Args:
        path: the file.

    Returns:
        The digits.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack_in_child(path: Path, home: Path) -> None:
    """Write what a file says into a directory, in a process that takes its memory with it.

    Args:
        path: the GGUF file.
        home: the directory; what it held is replaced.

    Raises:
        LowtideError: as `unpack` raised it there, or the child was stopped.
    """
    child = subprocess.run(
        [sys.executable, "-P", "-m", "lowtide.model.gguf.unpack", str(path), str(home)],
        stdout=subprocess.PIPE,
        check=False,
    )
    try:
        answer = json.loads(child.stdout)
    except ValueError as error:
        raise LowtideError(
            f"reading what {path} says stopped with exit code {child.returncode}. Try again."
        ) from error
    if answer:
        raise KINDS[answer["error"]](answer["message"])


def refuse_others(file: GgufFile) -> None:
    """Refuse a file that holds something else than a model.

    Args:
        file: its headers.

    Raises:
        ModelError: says what it is.
    """
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        what = _OTHERS.get(kind) if isinstance(kind, str) else None
        said = what or f"of the type {shown(kind)}, not a model. Give the file of a model"
        raise ModelError(f"{file.path} is {said}.")
