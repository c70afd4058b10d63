"""Text files as pieces of text, so that none is ever held whole."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from lowtide.errors import DataError

BOM = b"\xef\xbb\xbf"
PIECE_BYTES = 1 << 18


def iter_text(path: Path) -> Iterator[str]:
    """A UTF-8 file in pieces, a leading byte-order mark removed and line ends left as they are.

    Args:
        path: The file.

    Yields:
        Pieces, none of them empty.

    Raises:
        DataError: It cannot be read or is not UTF-8; says on which line.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    try:
        with open(path, "rb") as file:
            raw = file.read(PIECE_BYTES)
            refuse_utf16(raw, path)
            raw = raw.removeprefix(BOM) or file.read(PIECE_BYTES)
            while raw:
                if piece := _decoded(decoder, raw, path, line):
                    yield piece
                line += piece.count("\n")
                raw = file.read(PIECE_BYTES)
            _decoded(decoder, b"", path, line)
    except OSError as error:
        raise unreadable(path, error) from None


def iter_plain(path: Path) -> Iterator[str]:
    """The pieces of a .txt file.

    Args:
        path: The file.

    Yields:
        Pieces, none of them empty.

    Raises:
        DataError: As `iter_text`; or it is empty, or holds NUL bytes and so is no text.
    """
    line, blank = 1, True
    for piece in iter_text(path):
        if "\0" in piece:
            line += piece.count("\n", 0, piece.index("\0"))
            raise DataError(
                f"{path} holds a NUL byte on line {line}: it is no text, or was not written to its "
                "end. Save it again as UTF-8."
            )
        line += piece.count("\n")
        blank = blank and not piece.strip()
        yield piece
    if blank:
        raise EmptyDataError(f"{path} is empty. Expected text to train on.")


class EmptyDataError(DataError):
    """There is nothing in a file, which for validation data is no reason to stop."""

    @property
    def kind(self) -> str:
        """To a parent process it is a DataError like any other."""
        return DataError.__name__


def unreadable(path: Path, error: OSError) -> DataError:
    """The error of a file that the system does not let us read."""
    return DataError(f"cannot read {path}: {error.strerror or error}.")


def refuse_utf16(raw: bytes, path: Path) -> None:
    """Refuse a file by the byte-order mark of UTF-16.

    Args:
        raw: Its first bytes.
        path: The file.

    Raises:
        DataError: It has that mark.
    """
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is UTF-16. Save it as UTF-8.")


def _decoded(decoder: codecs.IncrementalDecoder, raw: bytes, path: Path, line: int) -> str:
    try:
        return decoder.decode(raw, final=not raw)
    except UnicodeDecodeError as error:
        before: bytes = error.object[: error.start]
        raise DataError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} on line "
            f"{line + before.count(10)}. Save it as UTF-8."
        ) from None
