"""A page as data (sections of text, tables and figures), and as HTML and Markdown.

Text may hold `code` between backticks; everything else in it is shown as it is.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LONG = 48
"""Cells of more characters than this are wrapped."""
_STYLE = Path(__file__).with_name("webpage.css")
# Nothing is loaded from anywhere, and no script runs, whatever text the page shows.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_MARKDOWN_SPECIAL = re.compile(r"([\\`*\[\]|#~])|(?<!\w)(_)|(_)(?!\w)")


@dataclass(frozen=True)
class Text:
    """One paragraph; `lead` sets it large."""

    text: str
    lead: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Absent:
    """Stands in a cell, over `span` columns, for figures that there are not, and says why."""

    reason: str
    span: int = 1


Cell = str | Absent


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: headings.
        rows: cells; an `Absent` counts as many columns as it spans.
        text_columns: how many of the first columns hold text; the others are numbers.
        caption: what the table shows.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text_columns: int = 1
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A plot, drawn by `lowtide.bench.plots` from `chart`.

    Attributes:
        name: of its file, without the suffix.
        chart: what `plots.draw` reads.
        alt: what it shows, for who cannot see it.
        caption: under the plot; what the eye should look for.
    """

    name: str
    chart: Mapping[str, Any]
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Figures:
    """Plots that stand together."""

    figures: Sequence[Figure]


@dataclass(frozen=True)
class Drawn:
    """HTML as it stands. Whoever makes it has escaped what is in it."""

    html: str


Block = Text | Bullets | Table | Figures | Drawn


@dataclass(frozen=True)
class Section:
    """A heading and what is under it."""

    title: str
    blocks: Sequence[Block] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """The section's id."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """The whole report.

    Attributes:
        title: its heading.
        sections: what it says.
        style: CSS of its own.
        themed: whether it follows a dark theme; plots that are images cannot.
    """

    title: str
    sections: Sequence[Section]
    style: str = ""
    themed: bool = False

    def figures(self) -> list[Figure]:
        """Every plot."""
        blocks = [block for section in self.sections for block in section.blocks]
        return [one for block in blocks if isinstance(block, Figures) for one in block.figures]


def to_html(page: Page, plots: Mapping[str, bytes]) -> str:
    """One self-contained page.

    Args:
        page: the report.
        plots: SVG by name of figure; they go into the page, each apart from the others' ids.

    Returns:
        The document.
    """
    links = "".join(
        f'<li><a href="#{s.anchor}">{html.escape(s.title)}</a></li>' for s in page.sections
    )
    body = "".join(
        f'<section id="{section.anchor}"><h2>{html.escape(section.title)}</h2>\n'
        + "\n".join(_html_block(block, plots) for block in section.blocks)
        + "</section>\n"
        for section in page.sections
    )
    title = html.escape(page.title)
    return (
        f'<!DOCTYPE html>\n<html lang="en"{" class=themed" if page.themed else ""}><head>'
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}{page.style}</style></head>\n"
        f"<body><main><h1>{title}</h1>\n<nav><ul>{links}</ul></nav>\n{body}</main></body></html>\n"
    )


def _html_block(block: Block, plots: Mapping[str, bytes]) -> str:
    if isinstance(block, Text):
        return f"<p{' class=lead' if block.lead else ''}>{_inline(block.text)}</p>"
    if isinstance(block, Bullets):
        return f"<ul>{''.join(f'<li>{_inline(item)}</li>' for item in block.items)}</ul>"
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Drawn):
        return block.html
    drawn = "".join(_html_figure(figure, plots[figure.name]) for figure in block.figures)
    return f'<div class="figures">{drawn}</div>'


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _html_figure(figure: Figure, svg: bytes) -> str:
    data = base64.b64encode(svg).decode("ascii")
    caption = f"<figcaption>{_inline(figure.caption)}</figcaption>" if figure.caption else ""
    return (
        f'<figure id="{html.escape(figure.name)}"><img alt="{html.escape(figure.alt)}" '
        f'src="data:image/svg+xml;base64,{data}">{caption}</figure>'
    )


def _html_table(table: Table) -> str:
    # Above the box, not in it: a caption as wide as a scrolled table could not be read.
    caption = f'<p class="caption">{_inline(table.caption)}</p>\n' if table.caption else ""
    head = _html_row(table.columns, "th", table.text_columns).replace("_", "_<wbr>")
    rows = "\n".join(_html_row(cells, "td", table.text_columns) for cells in table.rows)
    return (
        f'{caption}<div class="scroll" tabindex="0"><table><thead>{head}</thead>\n'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _html_row(cells: Sequence[Cell], tag: str, text_columns: int) -> str:
    out, place = [], 0
    for cell in cells:
        if isinstance(cell, Absent):
            text, span, kind = cell.reason, f' colspan="{cell.span}"', "absent"
            place += cell.span
        else:
            kind = "n" if place >= text_columns else "long" if len(cell) > _LONG else "t"
            text, span = cell, ""
            place += 1
        out.append(f'<{tag} class="{kind}"{span}>{_inline(text)}</{tag}>')
    return f"<tr>{''.join(out)}</tr>"


def to_markdown(page: Page, link: Callable[[Figure], str]) -> str:
    """The same tables and text; plots are linked.

    Args:
        page: the report.
        link: the path of a figure's file, as the Markdown file should name it.

    Returns:
        The document.
    """
    parts = [f"# {_escaped(page.title)}"]
    for section in page.sections:
        parts.append(f"## {_escaped(section.title)}")
        parts += [_markdown_block(block, link) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _markdown_block(block: Block, link: Callable[[Figure], str]) -> str:
    if isinstance(block, Text):
        return _escaped(block.text)
    if isinstance(block, Bullets):
        return "\n".join(f"- {_escaped(item)}" for item in block.items)
    if isinstance(block, Table):
        return _markdown_table(block)
    if isinstance(block, Drawn):
        return ""
    return "\n\n".join(
        f"![{_escaped(figure.alt)}]({link(figure)})"
        + (f"\n\n{_escaped(figure.caption)}" if figure.caption else "")
        for figure in block.figures
    )


def _escaped(text: str) -> str:
    """Text as Markdown that shows just that; code between backticks stays code."""
    pieces = re.split(r"(`[^`]+`)", text.replace("\n", " "))
    for place in range(0, len(pieces), 2):
        plain = pieces[place].replace("&", "&amp;").replace("<", "&lt;")
        pieces[place] = _MARKDOWN_SPECIAL.sub(r"\\\1\2\3", plain)
    for place in range(1, len(pieces), 2):
        pieces[place] = pieces[place].replace("|", "\\|")
    return "".join(pieces)


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[Cell]) -> str:
        out: list[str] = []
        for cell in cells:
            if isinstance(cell, Absent):
                short = cell.reason.split(":")[0]
                out += [_escaped(cell.reason), *[_escaped(short)] * (cell.span - 1)]
            else:
                out.append(_escaped(cell))
        return f"| {' | '.join(out)} |"

    left, right = table.text_columns, len(table.columns) - table.text_columns
    rule = f"|{'---|' * left}{'---:|' * right}"
    lines = [line(table.columns), rule, *(line(row) for row in table.rows)]
    caption = f"{_escaped(table.caption)}\n\n" if table.caption else ""
    return caption + "\n".join(lines)
