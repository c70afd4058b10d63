"""How results show themselves in a notebook: a heading and a small table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """HTML of names and values; whatever they hold is shown as text.

    Args:
        title: over the table.
        rows: names and values.

    Returns:
        The fragment.
    """
    cells = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th>'
        f'<td style="text-align:right">{escape(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table><caption>{escape(title)}</caption><tbody>{cells}</tbody></table>"


def megabytes(count: float) -> str:
    """Bytes as MB = 10^6."""
    return f"{count / 1e6:,.1f} MB"
