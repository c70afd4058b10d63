"""lowtide as a process of its own."""

from __future__ import annotations

import sys


def lowtide_command(*arguments: str) -> list[str]:
    """A lowtide command that prints JSON, run by this Python."""
    return [sys.executable, "-P", "-m", "lowtide.cli.main", *arguments, "--json"]
