"""From a path to raw rows: which file holds a split, and what its lines say.

JSON Lines are read one line at a time, so a data set may be larger than memory. Everything that
is wrong with a file is collected first and reported together.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowtide.errors import DataError, listed

SUFFIXES = (".jsonl", ".json", ".txt")
MAX_PROBLEMS = 10
_BOM = b"\xef\xbb\xbf"
_EXPECTED = "Expected a .jsonl, .json or .txt file, or a directory with train.jsonl"


class Problems:
    """What is wrong with one file, up to the number that a reader can take in at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, problem: str) -> None:
        """Note one problem.

        Args:
            problem: Where it is and what was found and expected.

        Raises:
            DataError: There are as many problems as fit in one report.
        """
        self._found.append(problem)
        if len(self._found) >= MAX_PROBLEMS:
            self._found.append("and perhaps more: reading stopped here")
            self.raise_if_any()

    def raise_if_any(self) -> None:
        """End the reading.

        Raises:
            DataError: There was a problem.
        """
        if self._found:
            raise DataError(
                f"{self._path} cannot be used:\n{listed(self._found)}\n"
                "Mend or remove these records."
            )


def resolve_split(data: Path, split: str) -> Path | None:
    """The file of a split: `data` itself, or `<split>.jsonl` (.json, .txt) in that directory.

    Args:
        data: What the user gave as data.
        split: "train", "valid" or "test".

    Returns:
        The file, or None where a directory has no such split.

    Raises:
        DataError: There is nothing at `data`, or it is not a kind of file that is read, or the
            directory has the split twice.
    """
    try:
        is_directory = stat.S_ISDIR(data.stat().st_mode)
    except OSError as error:
        raise DataError(f"no data at {data}: {error.strerror}. {_EXPECTED}.") from None
    if not is_directory:
        if data.suffix.lower() not in SUFFIXES:
            raise DataError(f"cannot read {data}: unknown suffix {data.suffix!r}. {_EXPECTED}.")
        return data
    found = [path for suffix in SUFFIXES if (path := data / f"{split}{suffix}").is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DataError(f"{data} holds both {names}. Keep one of them.")
    return found[0] if found else None


def require_split(data: Path, splits: tuple[str, ...]) -> Path:
    """The file of the first of these splits that there is.

    Args:
        data: What the user gave as data.
        splits: Names in order of preference.

    Returns:
        The file.

    Raises:
        DataError: There is none; says what the directory holds instead.
    """
    for split in splits:
        path = resolve_split(data, split)
        if path is not None:
            return path
    try:
        names = sorted(path.name for path in data.iterdir())
    except OSError as error:
        raise _unreadable(data, error) from None
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    wanted = " or ".join(f"{split}.jsonl" for split in splits)
    raise DataError(
        f"{data} holds no {wanted} (.json and .txt are read too); it holds "
        f"{shown or 'nothing'}. Rename the file, or pass the file itself."
    )


def read_text(path: Path) -> str:
    """A whole text file, a leading byte-order mark removed and line ends left as they are.

    Args:
        path: The file.

    Returns:
        Its text.

    Raises:
        DataError: It is empty or not UTF-8.
    """
    text = _decode(_read(path).removeprefix(_BOM), path)
    if not text.strip():
        raise DataError(f"{path} is empty. Expected text to train on.")
    return text


def iter_rows(path: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    """The JSON values of a .jsonl file, line by line, or of the list in a .json file.

    Args:
        path: The file.
        problems: Takes the lines that are not JSON.

    Yields:
        Where a value is ("line 3", "record 3"), and the value.

    Raises:
        DataError: The file cannot be read at all.
    """
    if path.suffix.lower() == ".json":
        yield from _iter_json(path)
        return
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    _refuse_utf16(raw, path)
                    raw = raw.removeprefix(_BOM)
                if not raw.strip():
                    continue
                where = f"line {number}"
                value, problem = _parse(raw)
                if problem is None:
                    yield where, value
                else:
                    problems.add(f"{where}: {problem}")
    except OSError as error:
        raise _unreadable(path, error) from None


def _iter_json(path: Path) -> Iterator[tuple[str, Any]]:
    text = _decode(_read(path).removeprefix(_BOM), path)
    if not text.strip():
        raise DataError(f"{path} is empty. Expected a JSON list of records.")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):
            raise DataError(
                f"{path} holds more than one JSON value, as JSON Lines do. Rename it to "
                f"{path.with_suffix('.jsonl').name}."
            ) from None
        raise DataError(f"{path} is not valid JSON: {_json_reason(error)}.") from None
    if not isinstance(rows, list):
        raise DataError(f"{path} holds {kind_of(rows)}; expected a JSON list of records.")
    for number, row in enumerate(rows, start=1):
        yield f"record {number}", row


def _parse(raw: bytes) -> tuple[Any, str | None]:
    """One line's value, or what is wrong with the line."""
    try:
        text = raw.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        return None, f"byte 0x{raw[error.start]:02x} at {error.start + 1} is not UTF-8"
    try:
        return json.loads(text), None
    except (ValueError, RecursionError) as error:
        return None, f"not valid JSON: {_json_reason(error)}"


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        place = f"column {error.colno}"
        if error.lineno > 1:
            place = f"line {error.lineno}, {place}"
        return f"{error.msg} ({place})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot read {path}: {error.strerror or error}.")


def _decode(raw: bytes, path: Path) -> str:
    _refuse_utf16(raw, path)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} on line {line}. Save it as UTF-8."
        ) from None


def _refuse_utf16(raw: bytes, path: Path) -> None:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is UTF-16. Save it as UTF-8.")


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "a number")
