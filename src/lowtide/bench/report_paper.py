"""The figures of the MeSP paper (arXiv 2602.13069) that the report sets beside ours.

iPhone, 4-bit base model, LoRA on all linears, SGD; memory is phys_footprint sampled every 0.5 s.
"""

from __future__ import annotations

from dataclasses import dataclass

from .report_data import Case

STORE_H_DIFFERENCE_MB = 398.5 - 368.4
"""Store h less recompute h on the 3B model at T = 256, r = 8."""
MEZO_COSINE = 0.001
"""Of MeZO's gradient with the exact one."""


@dataclass(frozen=True)
class PaperFigure:
    """Peak memory in MB of 10^6 bytes and seconds of a step, where the paper has them."""

    megabytes: float
    wall_s: float | None = None


def _table() -> dict[tuple[str, int, int, str], PaperFigure]:
    """(shape, T, r, label of the method) -> figures."""
    small, large = "qwen2.5-0.5b", "qwen2.5-3b"
    figures: dict[tuple[str, int, int, str], PaperFigure] = {}
    for shape, mebp, mesp, mebp_s, mesp_s in (
        (small, 360.8, 136.2, 0.68, 0.86),
        ("qwen2.5-1.5b", 516.2, 262.6, 1.66, 2.17),
        (large, 637.6, 368.4, 3.21, 4.09),
    ):
        figures[shape, 256, 8, "mebp full"] = PaperFigure(mebp, mebp_s)
        figures[shape, 256, 8, "mesp"] = PaperFigure(mesp, mesp_s)
    sequence = ((128, 8, 252.7, 110.7), (512, 8, 582.4, 245.8), (1024, 8, 1050.3, 513.6))
    rank = ((256, 4, 355.2, 132.8), (256, 16, 372.4, 143.5), (256, 32, 395.8, 158.2))
    for tokens, r, mebp, mesp in (*sequence, *rank):
        figures[small, tokens, r, "mebp full"] = PaperFigure(mebp)
        figures[small, tokens, r, "mesp"] = PaperFigure(mesp)
    figures[large, 256, 8, "mesp store-h"] = PaperFigure(398.5, 3.85)
    return figures


_FIGURES = _table()


def paper_figure(case: Case, method: str | None = None) -> PaperFigure | None:
    """The paper's counterpart of a case.

    Args:
        case: a step.
        method: another method's label than the case's.

    Returns:
        None where the paper has no such case.
    """
    if int(case.setting("batch_size") or 1) != 1:
        return None
    return _FIGURES.get((case.model.lower(), case.seq_len, case.rank, method or case.method))
