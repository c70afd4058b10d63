"""What commands print: people's text, or one JSON document on stdout and the text on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO, TypeVar

from lowtide.config import build, given_values, parser_for
from lowtide.runs.lines import finite

S = TypeVar("S")


class Output:
    """Where a command's text and its result go."""

    def __init__(self, as_json: bool) -> None:
        """With `as_json`, text goes to stderr and only the result to stdout."""
        self.as_json = as_json
        self.goes_on = False
        """Whether the work matters more than its text: nobody listening does not end it."""

    @property
    def stream(self) -> TextIO:
        """The stream of people's text."""
        return sys.stderr if self.as_json else sys.stdout

    def say(self, text: str = "", end: str = "\n") -> None:
        """Print text for people."""
        try:
            print(text, end=end, file=self.stream, flush=True)
        except OSError:
            if not self.goes_on:
                raise
            discard(self.stream)

    def result(self, document: Mapping[str, Any]) -> None:
        """Print the JSON document, if it was asked for."""
        if self.as_json:
            print(json.dumps(finite(document), ensure_ascii=False), flush=True)


def discard(stream: TextIO) -> None:
    """Send what a stream still holds, and all that follows, nowhere."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def settings_of(
    kind: type[S], command: str, description: str, argv: Sequence[str]
) -> tuple[S, Output]:
    """Parse a command line into its settings dataclass.

    Args:
        kind: the settings dataclass.
        command: the command's name.
        description: its help.
        argv: arguments after the command's name.

    Returns:
        The settings, and the output that --json asks for.

    Raises:
        ConfigError: an argument, a key of --config or a value is wrong.
    """
    parsed = parser_for(kind, f"lowtide {command}", description).parse_strictly(argv)
    return build(kind, given_values(parsed)), Output(parsed.json)


def megabytes(count: float) -> str:
    """Bytes as MB = 10^6."""
    return f"{count / 1e6:,.1f} MB"


def count(number: int) -> str:
    """A count as `494.0 M` or `260,032`."""
    return f"{number / 1e6:,.1f} M" if number >= 1_000_000 else f"{number:,}"


def duration(seconds: float) -> str:
    """Seconds as `1h 02m`, `3m 04s` or `5.6s`."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)}h {int(seconds % 3600 // 60):02d}m"
    if seconds >= 60:
        return f"{int(seconds // 60)}m {int(seconds % 60):02d}s"
    return f"{seconds:.1f}s"
