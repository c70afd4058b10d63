"""The values of a JSON list, one after another, without holding the list."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowtide.data.text import EmptyDataError, iter_text
from lowtide.errors import DataError

RECORD_CHARS = 1 << 24
_SPACE = re.compile(r"[ \t\n\r]*")
_SLACK = 64


def iter_list(path: Path) -> Iterator[Any]:
    """The values of the list in a .json file.

    Args:
        path: The file.

    Yields:
        The values in order.

    Raises:
        DataError: The file is not readable, not JSON, or not a list; or a value is too long.
    """
    reader = _Reader(path)
    first = reader.peek()
    if not first:
        raise EmptyDataError(f"{path} is empty. Expected a JSON list of records.")
    if first != "[":
        found = reader.value("its first value")
        reader.refuse_more()
        raise DataError(f"{path} holds {kind_of(found)}; expected a JSON list of records.")
    reader.skip()
    if reader.peek() == "]":
        reader.skip()
    else:
        yield from _items(reader)
    reader.refuse_more()


def _items(reader: _Reader) -> Iterator[Any]:
    number = 1
    while True:
        yield reader.value(f"record {number}")
        number += 1
        mark = reader.peek()
        if mark not in (",", "]"):
            raise reader.error("Expecting ',' delimiter")
        reader.skip()
        if mark == "]":
            return
        if reader.peek() == "]":
            raise reader.error("Illegal trailing comma before end of array")


class _Reader:
    """A window of the text, from the value being read on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pieces = iter_text(path)
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._lines, self._column = 0, 0
        """Line ends before the window, and characters between the last one and the window."""

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None, "it matches nothing too"
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill():
                return ""

    def skip(self) -> None:
        """Go behind the character that `peek` saw."""
        self._at += 1

    def value(self, name: str) -> Any:
        """The next value, and go behind it."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # Whatever is wrong close to the end of the window may be only that it ends there.
                cut = error.msg.startswith("Unterminated") or (
                    error.pos >= len(self._text) - _SLACK
                )
                if cut and self._within(name) and self._fill():
                    continue
                raise self.error(error.msg, error.pos) from None
            except RecursionError:
                raise self.error("nested too deeply") from None
            except ValueError as error:  # a number of thousands of digits
                raise self.error(str(error)) from None
            if end == len(self._text) and self._within(name) and self._fill():
                continue
            self._at = end
            return value

    def refuse_more(self) -> None:
        """Nothing but white space may follow."""
        if self.peek():
            raise DataError(
                f"{self._path} holds more than one JSON value, as JSON Lines do. Rename it to "
                f"{self._path.with_suffix('.jsonl').name}."
            )

    def error(self, what: str, at: int | None = None) -> DataError:
        """What is wrong, and where in the file."""
        at = self._at if at is None else at
        lines = self._text.count("\n", 0, at)
        column = at - self._text.rfind("\n", 0, at) if lines else self._column + at + 1
        line = self._lines + lines + 1
        place = f"line {line}, column {column}" if line > 1 else f"column {column}"
        return DataError(f"{self._path} is not valid JSON: {what} ({place}).")

    def _within(self, name: str) -> bool:
        if len(self._text) - self._at <= RECORD_CHARS:
            return True
        raise DataError(
            f"{self._path}, {name}: it is not closed within {RECORD_CHARS / 1e6:.0f} million "
            "characters. Split it into shorter records, or mend the file."
        )

    def _fill(self) -> bool:
        """Add a piece to the window and drop what has been read; False at the end of the file."""
        piece = next(self._pieces, "")
        if not piece:
            return False
        read = self._text[: self._at]
        lines = read.count("\n")
        self._lines += lines
        self._column = len(read) - read.rfind("\n") - 1 if lines else self._column + len(read)
        self._text, self._at = self._text[self._at :] + piece, 0
        return True


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "a number")
