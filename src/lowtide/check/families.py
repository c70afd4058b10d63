"""`python -m lowtide.check.families --out docs/families.md`: the conformance table.

For development: needs transformers and peft.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lowtide.model.families import FAMILIES

from .conformance import GREEDY, Errors, Example, measure
from .planned import planned_and_measured

_START, _END = "<!-- table -->", "<!-- end of table -->"
_HEADER = (
    "| `model_type` | examples | logits | logits, float32 | gradients | gradients, float32 "
    "| against autograd | key/value cache | greedy tokens | to PEFT | from PEFT | planner |"
)


def table(names: Sequence[str]) -> str:
    """The worst of each family's examples, as Markdown.

    Args:
        names: families, by `model_type`.

    Returns:
        Lines of a table.
    """
    lines = [_HEADER, "|" + "---|" * _HEADER.count("| ")]
    for name in names:
        found = []
        for config in FAMILIES[name].examples:
            with TemporaryDirectory() as scratch:
                found.append(measure(Example.write(Path(scratch), config)))
        predicted, measured = planned_and_measured(FAMILIES[name].examples[0])
        lines.append(_row(name, found, (predicted - measured) / measured))
    return "\n".join(lines)


def _row(name: str, found: Sequence[Errors], planner: float) -> str:
    def worst(field: str) -> float:
        return max(float(getattr(one, field)) for one in found)

    cells = [
        f"`{name}`",
        str(len(found)),
        f"{worst('logits'):.0e}",
        f"{worst('logits_float32'):.2f}",
        f"{worst('gradients'):.0e}",
        f"{worst('gradients_float32'):.2f}",
        f"{worst('autograd'):.0e}",
        f"{worst('cache'):.0e}",
        f"{min(one.greedy for one in found)} of {GREEDY}",
        f"{worst('to_peft'):.0e}",
        f"{worst('from_peft'):.0e}",
        f"{planner:+.1%}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table, or put it in its place in a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=[], help="all of them without any")
    parser.add_argument("--out", type=Path, help="a page with the marks of the table")
    given = parser.parse_args()
    page = "" if given.out is None else given.out.read_text(encoding="utf-8")
    torch.set_num_threads(1)
    text = table(given.families or sorted(FAMILIES))
    if given.out is None:
        print(text)
        return
    pattern = re.escape(_START) + ".*?" + re.escape(_END)
    marked = f"{_START}\n{text}\n{_END}"
    given.out.write_text(re.sub(pattern, lambda _: marked, page, flags=re.S), encoding="utf-8")


if __name__ == "__main__":
    main()
