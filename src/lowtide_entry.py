"""The `lowtide` program, apart from the package so that it runs before torch is imported.

Importing torch takes a second or two; a Ctrl-C in that time ends like any other.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run `lowtide`; returns the exit code."""
    try:
        from lowtide.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        print("lowtide: interrupted.", file=sys.stderr)
        return 130
