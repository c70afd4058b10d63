"""Real models' shapes with random weights: memory and time of a step do not depend on the values.

`config.json` of each shape is in `configs/`. The weights are written once to a cache directory, by
a child process (`python -m lowtide.bench.shapes NAME CACHE_DIR`), so that their making leaves
nothing in the memory that is measured afterwards.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowtide.caches import cache_root
from lowtide.config import did_you_mean, setting
from lowtide.errors import KINDS, LowtideError, ModelError, OutputError
from lowtide.model.families import spec_from_config
from lowtide.model.spec import ModelSpec
from lowtide.weights.checkpoint import SINGLE_FILE
from lowtide.weights.gguf.file import is_gguf
from lowtide.weights.writer import safetensors_header, tensor_bytes, write_atomically

CONFIGS = Path(__file__).resolve().parent / "configs"
SHAPES = tuple(sorted(path.stem for path in CONFIGS.glob("*.json")))
DEMO_MODEL = "bundled demo model"
"""What cases call the bundled model, whose path says nothing."""
_DTYPE = torch.bfloat16
_SEED = 0
_STD = 0.02
_NORM_STD = 0.05
_CHUNK = 1 << 20
"""Values made at a time: 4 MB in float32."""
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class ShapeSettings:
    """Random weights of the built-in shapes."""

    cache_dir: str | None = setting(
        None,
        help="where their weights are written, once; none is ~/.cache/lowtide/shapes",
        filled=True,
    )


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/lowtide/shapes`, or `~/.cache/lowtide/shapes`."""
    return cache_root() / "shapes"


def cache_directory(cache_dir: str | None) -> Path:
    """The directory of the setting `cache_dir`; None means the default."""
    return default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser().absolute()


def shape_config(name: str) -> dict[str, Any]:
    """The parsed config.json of a shape.

    Args:
        name: one of SHAPES.

    Returns:
        The object.
    """
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return config


def shape_of(model: str) -> str | None:
    """The shape that a `--model` names, or None where it names a directory or a hub id.

    Args:
        model: as the user gave it.

    Returns:
        One of SHAPES, or None.

    Raises:
        ModelError: it is neither a shape nor a path nor a hub id.
    """
    if model in SHAPES:
        return None if Path(model).is_dir() else model
    path = Path(model).expanduser()
    if "/" in model or os.sep in model or path.exists() or is_gguf(path):
        return None
    raise ModelError(
        f"there is no shape and no directory {model!r}{did_you_mean(model, SHAPES)}. Shapes: "
        f"{', '.join(SHAPES)}. Or give a model directory or a hub id such as Qwen/Qwen2.5-0.5B."
    )


def weight_bytes(spec: ModelSpec) -> int:
    """Bytes of the weights file of a shape, its header aside."""
    return spec.n_parameters * _DTYPE.itemsize


def is_cached(name: str, cache: Path) -> bool:
    """Whether the shape's weights lie in the cache already.

    Args:
        name: one of SHAPES.
        cache: the cache directory.

    Returns:
        True for a whole one; False where there is none.

    Raises:
        ModelError: something else lies in its place, or the family is not supported.
    """
    directory, config = cache / name, shape_config(name)
    header = _header(spec_from_config(config))
    size = len(header) + weight_bytes(spec_from_config(config))
    if not directory.exists():
        return False
    try:
        held = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        whole = held == config and (directory / SINGLE_FILE).stat().st_size == size
    except (OSError, ValueError):
        whole = False
    if not whole:
        raise ModelError(
            f"{directory} is not what lowtide writes for the shape {name} (another version's, or "
            "changed since). Remove it, or choose another --cache-dir."
        )
    return True


def shape_directory(name: str, cache: Path, say: Callable[[str], None]) -> Path:
    """The model directory of a shape, its weights written now if they are not in the cache.

    Args:
        name: one of SHAPES.
        cache: the cache directory; made where it does not exist.
        say: told the size before anything is written.

    Returns:
        A directory with config.json and model.safetensors.

    Raises:
        ModelError: the shape's family is not supported, or something else lies in its place.
        OutputError: the disk is too full, or cannot be written.
        LowtideError: the child that writes was stopped.
    """
    if is_cached(name, cache):
        return cache / name
    needed = weight_bytes(spec_from_config(shape_config(name)))
    check_disk(name, cache, needed)
    say(f"writing {needed / 1e6:,.0f} MB of random weights to {cache / name}")
    command = [sys.executable, "-P", "-m", "lowtide.bench.shapes", name, str(cache)]
    try:
        child = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    finally:
        _remove_abandoned(name, cache)
    if child.returncode != 0:
        try:
            answer = json.loads(child.stdout)
        except ValueError:
            raise LowtideError(
                f"writing the weights of {name} stopped with exit code {child.returncode}. "
                "Nothing was kept; run the command again."
            ) from None
        raise KINDS[answer["kind"]](answer["error"])
    return cache / name


def check_disk(name: str, cache: Path, needed: int) -> None:
    """Refuse when the disk has no room for a shape's weights.

    Args:
        name: the shape.
        cache: where they would go; it need not exist yet.
        needed: their bytes.

    Raises:
        OutputError: says what is free and what is needed.
    """
    existing = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    disk = shutil.disk_usage(existing)
    if disk.total > 0 and disk.free < needed + _SPARE_BYTES:
        raise OutputError(
            f"the weights of {name} need {needed / 1e6:,.0f} MB on the disk of {cache}, which has "
            f"{disk.free / 1e6:,.0f} MB free. Free some space or choose another --cache-dir."
        )


def write_shape(name: str, cache: Path) -> Path:
    """Write a shape's model directory in this process, under a temporary name until it is whole.

    Args:
        name: one of SHAPES.
        cache: the cache directory; made where it does not exist.

    Returns:
        The directory.

    Raises:
        ModelError: the shape's family is not supported.
        OutputError: the disk is full or cannot be written; nothing is left behind.
    """
    config = shape_config(name)
    spec = spec_from_config(config)
    temporary = cache / f".{name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        text = (json.dumps(config, indent=2) + "\n").encode()
        write_atomically(temporary / "config.json", [text])
        write_atomically(temporary / SINGLE_FILE, _file(spec))
        if not (cache / name).exists():  # else another process was faster
            os.rename(temporary, cache / name)
    except OSError as error:
        raise OutputError(
            f"{cache} cannot be written: {error.strerror}. Choose another --cache-dir."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return cache / name


def _header(spec: ModelSpec) -> bytes:
    return safetensors_header({n: (_DTYPE, shape) for n, shape in spec.tensor_shapes().items()})


def _file(spec: ModelSpec) -> Iterator[bytes | memoryview]:
    """The bytes of model.safetensors, a few MB at a time."""
    generator = torch.Generator().manual_seed(_SEED)
    yield _header(spec)
    for name, shape in spec.tensor_shapes().items():
        norm = name.endswith("norm.weight")  # near one, as trained ones are
        mean, std = (1.0, _NORM_STD) if norm else (0.0, _STD)
        left = math.prod(shape)
        while left:
            values = torch.empty(min(left, _CHUNK)).normal_(mean, std, generator=generator)
            yield tensor_bytes(values.to(_DTYPE))
            left -= values.numel()


def _remove_abandoned(name: str, cache: Path) -> None:
    """Remove what processes that live no more were writing."""
    for path in cache.glob(f".{name}.*.tmp"):
        found = re.fullmatch(r"(\d+)", path.name.removeprefix(f".{name}.").removesuffix(".tmp"))
        if found is not None and not _lives(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


if __name__ == "__main__":
    try:
        write_shape(sys.argv[1], Path(sys.argv[2]))
    except LowtideError as refusal:
        print(json.dumps({"kind": refusal.kind, "error": str(refusal)}))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
