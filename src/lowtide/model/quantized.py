"""Quantised models: written by `lowtide quantize`, or into a cache by `--quantize`.

A quantised model is an ordinary model directory: config.json, the tokenizer's files, the weights in
one safetensors file (see `weights.storages`), and a manifest of checksums.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

from lowtide.caches import cache_root
from lowtide.command import lowtide_command
from lowtide.config import did_you_mean
from lowtide.errors import KINDS, ConfigError, LowtideError, ModelError, OutputError
from lowtide.weights.checkpoint import Checkpoint, weight_files
from lowtide.weights.gguf.file import is_gguf
from lowtide.weights.manifest import MANIFEST_FILE, PARTIAL_FILE, STORAGE_KEY, Manifest
from lowtide.weights.quantize import JOURNAL_FILE, Said, finish, quantize_files
from lowtide.weights.storages import STORAGES
from lowtide.weights.writer import write_atomically

from .families import read_config, spec_from_config
from .hub import resolve_model
from .side_files import CONFIG_FILE, side_files
from .spec import HEAD

_UNFINISHED = (PARTIAL_FILE, JOURNAL_FILE)


def quantize_model(
    model: str, out: Path, storage: str, *, overwrite: bool = False, said: Said = lambda text: None
) -> Manifest:
    """Write a quantised copy of a model.

    Args:
        model: a model directory or a hub id.
        out: the new model directory, or one where the same work was interrupted.
        storage: a name of STORAGES.
        overwrite: whether a quantised model in `out` may be replaced.
        said: told of progress.

    Returns:
        The manifest, with the error of every matrix.

    Raises:
        ConfigError: there is no such storage.
        ModelError: the model cannot be used, or is quantised already.
        OutputError: `out` holds something else, or the disk is full or cannot be written.
    """
    check_storage(storage)
    directory = resolve_model(model)
    refuse_quantizing(directory, storage)
    config = read_config(directory)
    _refuse_quantized(directory)
    spec = spec_from_config(config)
    checkpoint = Checkpoint.open(directory)
    checkpoint.check(spec.tensor_shapes(), [HEAD] if spec.tied_head else [])
    _check_out(out, directory, overwrite)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be made: {error.strerror}. Choose another.") from error
    files = checkpoint.files
    manifest = quantize_files(files, out, spec.tensor_shapes(), STORAGES[storage], said)
    for path in side_files(directory):
        write_atomically(out / path.name, [path.read_bytes()])
    marked = {**config, "quantization_config": {STORAGE_KEY: storage}}
    write_atomically(out / CONFIG_FILE, [(json.dumps(marked, indent=2) + "\n").encode()])
    finish(out, manifest)
    return manifest


def check_storage(storage: str) -> None:
    """Refuse a name that is not in the registry.

    Args:
        storage: as the user gave it.

    Raises:
        ConfigError: names those that there are.
    """
    if storage not in STORAGES:
        raise ConfigError(
            f"quantize = {storage!r}: choose {', '.join(STORAGES)}{did_you_mean(storage, STORAGES)}"
        )


def verify_model(directory: Path) -> Manifest:
    """Read every byte of a quantised model and compare checksums.

    Args:
        directory: what `quantize_model` wrote.

    Returns:
        Its manifest.

    Raises:
        ModelError: it is not a quantised model, or is damaged.
    """
    checkpoint = Checkpoint.open(directory)
    manifest = Manifest.find(directory)
    if manifest is None:
        raise ModelError(
            f"{directory} is not a model that `lowtide quantize` wrote (it has no "
            f"{MANIFEST_FILE}), so there are no checksums to verify."
        )
    manifest.verify(checkpoint.files[0])
    return manifest


def cached_checkpoint(directory: Path, storage: str) -> Checkpoint:
    """The quantised weights of a model from the cache, quantised now if they are not there.

    The cache is renewed where the model's weight files are not those that were quantised, and
    where it is damaged. A child process does it, so that it leaves nothing in this one's memory.

    Args:
        directory: a model directory.
        storage: a name of STORAGES.

    Returns:
        The opened checkpoint, in the cache.

    Raises:
        ConfigError: there is no such storage.
        ModelError: the model cannot be used, or is quantised already.
        OutputError: the cache cannot be written.
        LowtideError: the child was stopped.
    """
    check_storage(storage)
    files = weight_files(directory)
    _refuse_quantized(directory)
    cache = cache_directory(directory, storage)
    found = _cached(cache, files)
    if found is None:
        _quantize_in_child(directory, cache, storage)
        found = Checkpoint.open(cache)
    return found


def cache_directory(directory: Path, storage: str) -> Path:
    """Where the cache of a model lies: named after its path, the path's checksum and the storage.

    Args:
        directory: a model directory.
        storage: a name of STORAGES.

    Returns:
        A directory in `$XDG_CACHE_HOME/lowtide/quantized` or `~/.cache/lowtide/quantized`.
    """
    path = directory.resolve()
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    return cache_root() / "quantized" / f"{path.name}-{digest}-{storage}"


def _cached(cache: Path, files: list[Path]) -> Checkpoint | None:
    """The cache's checkpoint if it is whole and of these files."""
    try:
        manifest = Manifest.find(cache)
        now = None if manifest is None else manifest.matching(files)
        if now is None:
            return None
        if now != manifest:
            now.write(cache)
        return Checkpoint.open(cache)
    except ModelError:
        return None


def _quantize_in_child(directory: Path, cache: Path, storage: str) -> None:
    """Run `lowtide quantize`, whose progress goes to stderr."""
    arguments = [str(directory.resolve()), str(cache), "--quantize", storage, "--overwrite"]
    child = subprocess.run(
        lowtide_command("quantize", *arguments),
        stdout=subprocess.PIPE,
        check=False,
    )
    if child.returncode == 0:
        return
    try:
        answer = json.loads(child.stdout)
        raise KINDS[answer["kind"]](answer["error"])
    except (ValueError, KeyError):
        raise LowtideError(
            f"quantising {directory} stopped with exit code {child.returncode}. Give the command "
            "again, and it goes on where it ended."
        ) from None


def refuse_quantizing(path: Path, storage: str | None) -> None:
    """Refuse to quantise what is in a GGUF file.

    Args:
        path: of a model.
        storage: what it should be quantised to; None to take it as it is.

    Raises:
        ModelError: it is a GGUF file, and a storage is given.
    """
    if storage is not None and is_gguf(path):
        raise ModelError(
            f"{path} is a GGUF file, whose weights are used as they are stored there; most are "
            "quantised already. Leave --quantize out, take a GGUF file of another type, or "
            "quantise the model directory that it was made of."
        )


def _refuse_quantized(directory: Path) -> None:
    manifest = Manifest.find(directory)
    if manifest is not None:
        raise ModelError(
            f"{directory} is quantised already ({manifest.storage}). Train and generate with it as "
            "it is, without --quantize, or quantise the model that it was made of."
        )


def _check_out(out: Path, source: Path, overwrite: bool) -> None:
    """Refuse a directory that holds anything but a quantised model, whole or unfinished."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; name a directory for the quantised model.")
    if not out.exists():
        return
    if out.resolve() == source.resolve():
        raise OutputError(
            f"{out} is the model itself. Name another directory for the quantised model."
        )
    held = {path.name for path in out.iterdir()}
    if not held or held <= set(_UNFINISHED):
        return
    if JOURNAL_FILE in held and MANIFEST_FILE not in held:
        return
    if MANIFEST_FILE not in held and not _is_marked(out):
        raise OutputError(
            f"{out} holds files that `lowtide quantize` did not write "
            f"({', '.join(sorted(held)[:3])}). Name another directory."
        )
    if not overwrite:
        raise OutputError(
            f"{out} already holds a quantised model. Choose another directory, replace it with "
            "--overwrite, or read every byte of it with --verify."
        )


def _is_marked(out: Path) -> bool:
    """Whether its config.json is one that `quantize_model` wrote."""
    try:
        return STORAGE_KEY in read_config(out).get("quantization_config", {})
    except (ModelError, TypeError):
        return False
