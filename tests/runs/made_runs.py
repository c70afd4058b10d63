"""Runs made up from nothing, and a reader of the page that is made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

NASTY = "<script>alert('&')</script><img src=http://x.invalid/a.png onerror=alert(1)>"
FACTS: dict[str, Any] = {
    "process": {"pid": 2**22 + 1, "started": 1, "boot": "none"},
    "machine": {"cpu": f"a processor {NASTY}", "memory_bytes": 8_000_000_000},
    "model": {"directory": "/m/tiny", "n_parameters": 1234},
    "adapter": {"n_parameters": 12, "modules": ["q_proj"]},
    "data": {"train": {"source": "letters.jsonl", "records": 7}},
    "memory_budget_bytes": 40_000_000,
}
START = {"event": "start", "step": 0, "time": "2026-01-02T03:04:05+00:00", **FACTS}
END = {"event": "end", "step": 9, "time": "2026-01-02T05:04:05+00:00", "state": "finished"}


def update(step: int, layers: int = 3, **more: Any) -> dict[str, Any]:
    """A line of an update."""
    return {
        "step": step, "loss": 1 + 2 * math.exp(-step / 50), "n_tokens": 10,
        "total_tokens": 10 * step, "wall_s": 0.5, "cpu_s": 1.0, "elapsed_s": step / 2,
        "tokens_per_s": 20.0, "grad_norm": 0.5, "learning_rate": 1e-3 / step,
        "peak_anon_bytes": 30_000_000 + step, "peak_rss_bytes": 90_000_000,
        "peak_file_bytes": 50_000_000, "temperature_c": 60.0,
        "grad_norms": [0.1 * (layer + 1) for layer in range(layers)], **more,
    }  # fmt: skip


def write_run(
    directory: Path,
    metrics: Iterable[Any] = (),
    events: Iterable[Any] = (START, END),
    settings: str = "model: /m/tiny\nmethod: mesp\niters: 9\n",
) -> Path:
    """A run's directory; entries that are text are written as they stand."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, entries in (("metrics.jsonl", metrics), ("events.jsonl", events)):
        with open(directory / name, "w", encoding="utf-8") as file:
            file.writelines(
                f"{entry if isinstance(entry, str) else json.dumps(entry)}\n" for entry in entries
            )
    (directory / "run.yaml").write_text(settings, encoding="utf-8")
    return directory


class PageRead(HTMLParser):
    """What a browser would make of the page: headings, text, and all that could load or run."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = self.style = ""
        self._in = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in ("h2", "style"):
            self._in = tag
        if tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._in:
            self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "style":
            self.style += data
            return
        if self._in == "h2":
            self.headings[-1] += data
        self.text += data

    def paths(self, kind: str) -> list[str]:
        """The drawn lines of a class."""
        out, chosen = [], False
        for tag, name, value in self.attributes:
            if tag == "path" and name == "class":
                chosen = value == kind
            elif tag == "path" and name == "d" and chosen:
                out.append(value)
        return out
