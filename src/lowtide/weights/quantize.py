"""Quantise a checkpoint into one safetensors file, some rows at a time.

The source is read and the result written in pieces of about a quarter million weights, so that the
memory this takes does not depend on the model. The result grows in `model.safetensors.partial`
beside a journal with a line for each finished tensor and its checksums. The same call made again
after an interruption checks the finished tensors and goes on with the others; the manifest,
written last, is what makes the result a model.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lowtide.errors import ModelError, OutputError

from .checkpoint import SINGLE_FILE, stored_entries
from .manifest import MANIFEST_FILE, PARTIAL_FILE, STORAGE_KEY, Manifest, SourceFile
from .places import Place, read_places
from .storages.base import QuantizedMatrix, Quantizer
from .writer import safetensors_header, tensor_bytes

JOURNAL_FILE = "quantize.journal"
_CHUNK = 1 << 18
"""Weights at a time: 1 MB in float32, of which some six copies exist while they are encoded."""

Said = Callable[[str], None]


class _Written(NamedTuple):
    """A finished tensor: checksums of its parts, and the error of a matrix."""

    sha256: dict[str, str]
    relative_rms_error: float | None


class _Layout(NamedTuple):
    """The file to be written: its header, and the places of all parts by tensor."""

    header: bytes
    parts: dict[str, dict[str, Place]]
    size: int


def quantize_files(
    files: Sequence[Path],
    out: Path,
    tensors: Mapping[str, tuple[int, ...]],
    storage: Quantizer,
    said: Said = lambda text: None,
) -> Manifest:
    """Write the quantised weights of a model; `finish` makes them a model.

    Args:
        files: the safetensors files of the source, which `Checkpoint.check` has found to be good.
        out: a directory; weights that it holds are replaced once the new ones are complete.
        tensors: shape by name of every tensor of the model; matrices are quantised, vectors copied.
        storage: of the matrices.
        said: told of progress.

    Returns:
        The manifest, not written yet.

    Raises:
        ModelError: a weight is not a finite number, or the source cannot be read.
        OutputError: the disk is full or cannot be written, or another process writes there.
    """
    said(f"reading {sum(path.stat().st_size for path in files) / 1e6:,.0f} MB for their checksum")
    source = tuple(SourceFile.of(path) for path in files)
    places = {name: place for path in files for name, place in read_places(path).items()}
    dtypes = {name: places[name].dtype for name in tensors}
    layout = _layout(tensors, dtypes, storage)
    header_sha256 = hashlib.sha256(layout.header).hexdigest()
    contents = [[one.name, one.sha256] for one in source]
    head = {"storage": storage.name, "source": contents, "header": header_sha256}
    done: dict[str, _Written] = {}
    with _partial_file(out) as descriptor:
        try:
            journal = _Journal(out / JOURNAL_FILE, head)
            done.update(journal.finished(descriptor, layout))
            if done:
                said(f"{len(done)} of {len(tensors)} tensors are there already")
            _reserve(descriptor, layout, done)
            said(f"writing {layout.size / 1e6:,.0f} MB of {storage.name} weights to {out}")
            for path in files:
                _quantize_file(path, descriptor, layout, storage, done, journal)
            os.fsync(descriptor)
            manifest = Manifest(
                storage.name,
                source,
                layout.size,
                header_sha256,
                {part: sha for name in tensors for part, sha in done[name].sha256.items()},
                {
                    name: done[name].relative_rms_error or 0.0
                    for name, shape in tensors.items()
                    if len(shape) == 2
                },
            )
            (out / MANIFEST_FILE).unlink(missing_ok=True)  # of the weights that are replaced now
            os.replace(out / PARTIAL_FILE, out / SINGLE_FILE)
        except OSError as error:
            if not done:
                _remove_partial(out)
            raise _disk_error(out, error, kept=len(done)) from error
    return manifest


def finish(out: Path, manifest: Manifest) -> None:
    """Make a model of a directory in which everything but the manifest is in place.

    Args:
        out: the directory.
        manifest: as `quantize_files` gave it.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    manifest.write(out)
    (out / JOURNAL_FILE).unlink(missing_ok=True)


def _layout(
    tensors: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], storage: Quantizer
) -> _Layout:
    """Tensors in the model's order; vectors keep their dtype."""
    entries = {
        name: {
            part: (dtype or dtypes[name], shape)
            for part, (dtype, shape) in stored_entries({name: whole}, storage).items()
        }
        for name, whole in tensors.items()
    }
    flat = {part: entry for parts in entries.values() for part, entry in parts.items()}
    header = safetensors_header(flat, {STORAGE_KEY: storage.name})
    start = len(header)
    places: dict[str, dict[str, Place]] = {}
    for name, parts in entries.items():
        places[name] = {}
        for part, (dtype, shape) in parts.items():
            places[name][part] = Place(dtype, shape, start)
            start += places[name][part].nbytes
    return _Layout(header, places, start)


@contextmanager
def _partial_file(out: Path) -> Iterator[int]:
    """The file being written, locked against other processes."""
    path = out / PARTIAL_FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _disk_error(out, error, kept=0) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise OutputError(
            f"another lowtide process is quantising into {out}. Wait until it has ended, and give "
            "the command again."
        ) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line of the journal; None where it is not whole, or is no line that was written there."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class _Journal:
    """One line that says what is quantised, then one for each finished tensor."""

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        """Keep what the file holds of the same work, and start it anew where it is of another."""
        self._path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        # The line that was being written when the process ended is not whole.
        whole = takewhile(lambda line: line is not None, map(_parsed, lines))
        self._lines = [line for line in whole if line is not None]
        if not self._lines or self._lines[0] != head:
            self._lines = [dict(head)]
        path.write_text("".join(json.dumps(line) + "\n" for line in self._lines), encoding="utf-8")

    def finished(self, descriptor: int, layout: _Layout) -> dict[str, _Written]:
        """Tensors of which the file still holds what the journal says."""
        done: dict[str, _Written] = {}
        size = os.fstat(descriptor).st_size
        for line in self._lines[1:]:
            name, sums, error = (line.get(key) for key in ("name", *_Written._fields))
            if not isinstance(name, str) or name not in layout.parts or not isinstance(sums, dict):
                continue
            if not isinstance(error, float | None) or size != layout.size:
                continue
            places = layout.parts[name]
            if all(place.sha256(descriptor) == sums.get(part) for part, place in places.items()):
                done[name] = _Written(sums, error)
        return done

    def add(self, name: str, written: _Written) -> None:
        """Note a finished tensor."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, **written._asdict()}) + "\n")


def _reserve(descriptor: int, layout: _Layout, done: Mapping[str, _Written]) -> None:
    """Give the file its size now: a disk that is too full says so before anything is computed."""
    if not done:
        os.ftruncate(descriptor, 0)
    if layout.size:
        os.posix_fallocate(descriptor, 0, layout.size)
    _write(descriptor, layout.header, 0)


def _quantize_file(
    path: Path,
    descriptor: int,
    layout: _Layout,
    storage: Quantizer,
    done: dict[str, _Written],
    journal: _Journal,
) -> None:
    """Quantise the tensors of one source file that are not done."""
    with open(path, "rb") as source:
        for name, place in read_places(path).items():
            if name in layout.parts and name not in done:
                parts = layout.parts[name]
                done[name] = _quantize_tensor(
                    name, (source.fileno(), place), descriptor, parts, storage
                )
                journal.add(name, done[name])


def _quantize_tensor(
    name: str,
    source: tuple[int, Place],
    descriptor: int,
    parts: dict[str, Place],
    storage: Quantizer,
) -> _Written:
    """Read a tensor, write its parts, and measure what that changed."""
    held, place = source
    matrix = name not in parts
    digests = {part: hashlib.sha256() for part in parts}
    changed = total = 0.0
    count, width = place.shape[0], place.nbytes // place.dtype.itemsize // place.shape[0]
    step = max(1, _CHUNK // width)
    for start in range(0, count, step):
        stored = place.rows(held, start, min(start + step, count))
        if not stored.isfinite().all():
            raise ModelError(
                f"{name} holds weights that are not finite numbers, so the model cannot be "
                "quantised. Download it again."
            )
        encoded = {name: stored}
        if matrix:
            rows = stored.float()
            encoded = storage.encode(rows)
            shape = (len(rows), width)
            decoded = QuantizedMatrix(storage, encoded, shape, torch.float32).whole()
            changed += float(decoded.sub_(rows).square_().sum(dtype=torch.float64))
            total += float(rows.square_().sum(dtype=torch.float64))
            encoded = {f"{name}.{part}": tensor for part, tensor in encoded.items()}
        for part, tensor in encoded.items():
            data = tensor_bytes(tensor)
            digests[part].update(data)
            row = parts[part].nbytes // count
            _write(descriptor, data, parts[part].start + start * row)
    error = (changed / total) ** 0.5 if total else 0.0
    return _Written({p: d.hexdigest() for p, d in digests.items()}, error if matrix else None)


def _write(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    left = memoryview(data).cast("B")
    while left:
        done = os.pwrite(descriptor, left, offset)
        left, offset = left[done:], offset + done


def _remove_partial(out: Path) -> None:
    for name in (PARTIAL_FILE, JOURNAL_FILE):
        (out / name).unlink(missing_ok=True)


def _disk_error(out: Path, error: OSError, kept: int) -> OutputError:
    remedy = "Free some space or choose another directory"
    if kept:
        remedy += (
            f"; the same command goes on after the {kept} tensors that are finished. To give it "
            f"up, remove {out}"
        )
    return OutputError(f"{out} cannot be written: {error.strerror}. {remedy}.")
