"""Reads what the report wrote: the tables of its HTML and of its Markdown."""

from __future__ import annotations

import re
from html.parser import HTMLParser

MINUS = "\N{MINUS SIGN}"


class Page(HTMLParser):
    """The tables (rows of cells), the text and what a browser would load of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.images: list[str] = []
        self._heading = ""
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.loads += [str(values[k]) for k in ("src", "srcset", "data") if values.get(k)]
        if tag != "a":
            self.loads += [str(values["href"])] if values.get("href") else []
        if tag == "img":
            self.images.append(str(values["alt"]))
        if tag == "h2":
            self._heading = ""
        if tag == "table":
            self.tables.setdefault(self._heading, []).append([])
        if tag == "tr":
            self.tables[self._heading][-1].append([])
        if tag in ("td", "th"):
            self.tables[self._heading][-1][-1].append("")
        if tag in ("h2", "td", "th", "style"):
            self._in = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._in:
            self._in = ""

    def handle_data(self, content: str) -> None:
        if self._in == "h2":
            self._heading += content
        elif self._in in ("td", "th"):
            self.tables[self._heading][-1][-1][-1] += content
        if self._in != "style":
            self.text += content

    def row(self, heading: str, *first: str, table: int = 0) -> list[str]:
        """The one row of a section's table that begins with these cells."""
        rows = [r for r in self.tables[heading][table] if r[: len(first)] == list(first)]
        assert len(rows) == 1, (heading, first, self.tables[heading][table])
        return rows[0]


def markdown_row(text: str, heading: str, *first: str) -> list[str]:
    """The first such row of a section of the Markdown file."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith(f"| {' | '.join(first)} |")]
    assert lines, (heading, first)
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", lines[0])[1:-1]]
