"""What decides the content of a token cache, and so makes its key.

The code of this package is part of it, so that nobody has to remember a version number.
"""

from __future__ import annotations

import hashlib
import stat
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lowtide.data.store import checksum
from lowtide.data.text import unreadable
from lowtide.errors import DataError

_LIBRARIES = ("tokenizers", "jinja2")
_TOKENIZER_FILES = ("*.json", "*.jinja", "additional_chat_templates/*.jinja")
_INDEX = "model.safetensors.index.json"
_TELLS_THE_DATE = b"strftime_now"


def status_of(source: Path) -> tuple[int, int]:
    """The size and time of a data file, by which a change while it is read is seen.

    Args:
        source: The file.

    Returns:
        Bytes and nanoseconds.

    Raises:
        DataError: It cannot be read, or is no file whose content lasts.
    """
    try:
        found = source.stat()
    except OSError as error:
        raise unreadable(source, error) from None
    if not stat.S_ISREG(found.st_mode):
        raise DataError(
            f"{source} is not a regular file (a pipe or a device), and data is read more than "
            "once. Save it to a file first."
        )
    return found.st_size, found.st_mtime_ns


def source_parts(source: Path) -> dict[str, Any]:
    """What a data file adds to a key: its content, and how it is read.

    Args:
        source: The file.

    Returns:
        `sha256` and `suffix`.

    Raises:
        DataError: It cannot be read.
    """
    return {"sha256": checksum(source), "suffix": source.suffix.lower()}


def tokenizer_parts(directory: Path, chat_template: str | None) -> dict[str, Any]:
    """What the tokenizer, its template and the code that uses them add to a key.

    Args:
        directory: With the tokenizer's files.
        chat_template: As `Tokenizer.load` takes it.

    Returns:
        Checksums by file, versions, and the date where a template asks for it.

    Raises:
        DataError: A file cannot be read.
    """
    paths = [path for pattern in _TOKENIZER_FILES for path in sorted(directory.glob(pattern))]
    paths = [path for path in paths if path.is_file() and path.name != _INDEX]
    template = Path(chat_template) if chat_template is not None else None
    own = template if template is not None and template.is_file() else None
    parts: dict[str, Any] = {
        "tokenizer": {str(path.relative_to(directory)): checksum(path) for path in paths},
        "chat_template": chat_template if own is None else checksum(own),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "code": _code(),
    }
    templates = [path for path in paths if path.name != "tokenizer.json"]
    if any(_TELLS_THE_DATE in path.read_bytes() for path in (*templates, *([own] if own else []))):
        parts["today"] = date.today().isoformat()
    return parts


def _code() -> str:
    """The checksum of this package's modules."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
