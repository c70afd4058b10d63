"""From a path to raw rows: which file holds a split, and what its lines say.

Records are read one at a time, so a data set may be larger than memory. Everything that is wrong
with a file is collected first and reported together.
"""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lowtide.data.json_list import iter_list
from lowtide.data.text import BOM, refuse_utf16, unreadable
from lowtide.errors import DataError, listed

SUFFIXES = (".jsonl", ".json", ".txt")
MAX_PROBLEMS = 10
LINE_BYTES = 1 << 24
_EXPECTED = "Expected a .jsonl, .json or .txt file, or a directory with train.jsonl"


class Tally:
    """Takes what is wrong with a file without ending the reading: counts, and the first of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return False  # records after a bad one are given out too

    def add(self, problem: str, kind: str) -> None:
        """Note one problem; see `Problems.add`."""
        self.counts[kind] += 1
        shown = self.examples.setdefault(kind, [])
        if len(shown) < MAX_PROBLEMS:
            shown.append(problem)

    def raise_if_any(self) -> None:
        """Nothing is raised."""


class Problems:
    """What is wrong with one file, up to the number that a reader can take in at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, problem: str, kind: str) -> None:
        """Note one problem.

        Args:
            problem: Where it is and what was found and expected.
            kind: What problems of its sort are counted under.

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
    folders = [path for suffix in SUFFIXES if (path := data / f"{split}{suffix}").is_dir()]
    if folders and not found:
        raise DataError(f"{folders[0]} is a directory. {_EXPECTED}.")
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
        raise unreadable(data, error) from None
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    wanted = " or ".join(f"{split}.jsonl" for split in splits)
    raise DataError(
        f"{data} holds no {wanted} (.json and .txt are read too); it holds "
        f"{shown or 'nothing'}. Rename the file, or pass the file itself."
    )


def iter_rows(path: Path, problems: Problems | Tally) -> Iterator[tuple[str, Any]]:
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
        for number, row in enumerate(iter_list(path), start=1):
            yield f"record {number}", row
        return
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(_lines(file), start=1):
                if number == 1 and isinstance(raw, bytes):
                    refuse_utf16(raw, path)
                    raw = raw.removeprefix(BOM)
                if isinstance(raw, bytes) and not raw.strip():
                    continue
                where = f"line {number}"
                value, problem = _parse(raw)
                if problem is None:
                    yield where, value
                else:
                    problems.add(f"{where}: {problem}", "not JSON")
    except OSError as error:
        raise unreadable(path, error) from None


def _lines(file: IO[bytes]) -> Iterator[bytes | int]:
    """The lines of a file; of one that is too long, only how many bytes it has."""
    while raw := file.readline(LINE_BYTES):
        if len(raw) < LINE_BYTES or raw.endswith(b"\n"):
            yield raw
            continue
        length = len(raw)
        while not raw.endswith(b"\n") and (raw := file.readline(LINE_BYTES)):
            length += len(raw)
        yield length


def _parse(raw: bytes | int) -> tuple[Any, str | None]:
    """One line's value, or what is wrong with the line."""
    if isinstance(raw, int):
        return None, (
            f"it is {raw / 1e6:,.1f} MB long, and a record may have {LINE_BYTES / 1e6:.1f} MB. "
            "Expected one JSON object on each line"
        )
    try:
        text = raw.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        return None, f"byte 0x{raw[error.start]:02x} at {error.start + 1} is not UTF-8"
    try:
        return json.loads(text), None
    except (ValueError, RecursionError) as error:
        problem = f"not valid JSON: {_json_reason(error)}"
    if b"\0" in raw:
        problem += "; it holds NUL bytes, as files do that were not written to their end"
    elif not raw.endswith(b"\n"):
        problem += "; the file ends within this line, so it may have been cut off"
    return None, problem


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
