"""Write what a GGUF file says as the small files of a model directory: the child of `home`.

python -m lowtide.model.gguf.unpack FILE DIRECTORY
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from lowtide.data.gguf_tokenizer import tokenizer_files
from lowtide.data.tokenizer_files import NO_TOKENIZER_FILE
from lowtide.errors import LowtideError, ModelError, OutputError
from lowtide.weights.gguf.file import GgufFile
from lowtide.weights.writer import write_atomically

from .home import SUMS_FILE, TENSORS_FILE, checksum, is_whole
from .read import config_from_metadata
from .tensors import gguf_tensors


def unpack(file: GgufFile, home: Path) -> None:
    """Write the directory of a file, whole or not at all.

    Args:
        file: its headers.
        home: the directory; what it held is replaced.

    Raises:
        ModelError: the metadata cannot be read or is of a model that is not supported.
        OutputError: the cache cannot be written.
    """
    files = _small_files(file)
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{home.name}.", dir=home.parent))
    except OSError as error:
        raise _unwritable(home, error) from error
    try:
        for name, held in files.items():
            write_atomically(scratch / name, [json.dumps(held).encode()])
        sums = {path.name: checksum(path) for path in scratch.iterdir()}
        write_atomically(scratch / SUMS_FILE, [json.dumps(sums).encode()])
        _publish(scratch, home)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _small_files(file: GgufFile) -> dict[str, Any]:
    """What is written, by name."""
    try:
        config = config_from_metadata(
            file.metadata, file.shapes, lambda name: file.vector(name).tolist()
        )
        tensors = gguf_tensors(config)
    except ModelError as error:
        raise ModelError(f"{file.path}: {error}") from error
    table = {name: (one.name, one.shape[0], one.heads, one.offset) for name, one in tensors.items()}
    return {"config.json": config, TENSORS_FILE: table, **_tokenizer_files(file)}


def _tokenizer_files(file: GgufFile) -> dict[str, Any]:
    """The tokenizer's files, or why there are none: a model is read without one too."""
    try:
        return tokenizer_files(file.metadata)
    except ModelError as error:
        return {NO_TOKENIZER_FILE: {"reason": f"{file.path}: {error}"}}


def _publish(scratch: Path, home: Path) -> None:
    """Give the directory its name. Another process may have been faster."""
    try:
        if home.exists() and not is_whole(home):
            shutil.rmtree(home)
        if not home.exists():
            os.rename(scratch, home)
    except OSError as error:
        if not is_whole(home):
            raise _unwritable(home, error) from error


def _unwritable(home: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{home} cannot be written: {error.strerror}. It takes what a GGUF file says of its model; "
        "set XDG_CACHE_HOME to a directory with room."
    )


def main(path: str, home: str) -> None:
    """Unpack in this process, and print {} or the error.

    Args:
        path: the GGUF file.
        home: the directory to be made.
    """
    answer = {}
    try:
        unpack(GgufFile.open(Path(path)), Path(home))
    except LowtideError as error:
        answer = {"error": error.kind, "message": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
