"""`lowtide bench report DIR`: results beside the paper's figures, as HTML and as Markdown."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lowtide.errors import InputError, LowtideError, OutputError
from lowtide.webpage import Figure, Page, to_html, to_markdown
from lowtide.weights.writer import write_atomically

from .report_data import Results, read_results
from .report_runs import convergence_section, peers_section, quality_section, timeline_section
from .report_steps import models_section, store_h_section, sweep_section
from .report_text import (
    commands_section,
    differences_section,
    failures_section,
    machine_section,
    summary_section,
)

HTML_FILE, MARKDOWN_FILE, PLOTS_DIR = "report.html", "report.md", "plots"
_DRAWING = Path(__file__).with_name("plots.py")
_STDERR_LINES = 8
_NO_MATPLOTLIB = 3


def report(directory: Path) -> tuple[Path, Path]:
    """Write `report.html`, one self-contained page, and `report.md` with `plots/*.svg`.

    Args:
        directory: of results; the report is written into it.

    Returns:
        The HTML file and the Markdown file.

    Raises:
        DataError: the results cannot be used.
        InputError: matplotlib is not installed.
        OutputError: the report cannot be written.
        LowtideError: the process that draws the plots died.
    """
    page = make_page(read_results(directory))
    plots = draw_plots(page.figures())
    folder = directory / PLOTS_DIR
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be made: {error.strerror}. The report is written into the directory "
            "of results; make it writable, or copy it to where you can write."
        ) from error
    for name, svg in plots.items():
        write_atomically(folder / f"{name}.svg", [svg])
    written = directory / HTML_FILE, directory / MARKDOWN_FILE
    markdown = to_markdown(page, lambda figure: f"{PLOTS_DIR}/{figure.name}.svg")
    for path, text in zip(written, (to_html(page, plots), markdown), strict=True):
        write_atomically(path, [text.encode("utf-8")])
    return written


def make_page(results: Results) -> Page:
    """The report's content, in its order."""
    return Page(
        "lowtide: memory, time and gradients beside the MeSP paper",
        [
            machine_section(results),
            summary_section(results),
            models_section(results),
            sweep_section(results, "sequence", "seq_len", "Sequence length"),
            sweep_section(results, "rank", "lora_r", "Rank"),
            store_h_section(results),
            timeline_section(results),
            quality_section(results),
            convergence_section(results),
            peers_section(results),
            differences_section(),
            failures_section(results),
            commands_section(results),
        ],
    )


def draw_plots(figures: Sequence[Figure]) -> dict[str, bytes]:
    """Draw in a process of its own, so that lowtide never holds matplotlib.

    Args:
        figures: what to draw.

    Returns:
        SVG by name of figure.

    Raises:
        InputError: matplotlib is not installed.
        LowtideError: the process died.
        KeyboardInterrupt: Ctrl-C.
    """
    if not figures:
        return {}
    with tempfile.TemporaryDirectory(prefix="lowtide-report-") as out:
        plots = [{"name": figure.name, "chart": figure.chart} for figure in figures]
        # -P, and by path: neither the working directory nor lowtide (and so torch) is imported.
        child = subprocess.run(
            [sys.executable, "-P", str(_DRAWING)],
            input=json.dumps({"out": out, "plots": plots}),
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if child.returncode == _NO_MATPLOTLIB:
            raise InputError(
                "`lowtide bench report` draws with matplotlib, which cannot be imported "
                f'({child.stderr.strip()}). Run: pip install "lowtide[bench]"'
            )
        if child.returncode:
            said = "\n  ".join(child.stderr.strip().splitlines()[-_STDERR_LINES:]) or "nothing"
            raise LowtideError(
                f"the process that draws the plots ended with code {child.returncode}. Its last "
                f"words:\n  {said}"
            )
        return {one.name: (Path(out) / f"{one.name}.svg").read_bytes() for one in figures}
