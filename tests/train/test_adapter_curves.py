"""Curves of DoRA, rsLoRA, and ranks and alphas by module, against transformers + peft + torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_recipe_curves import DATA, MODELS, compared, difference

KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora, rslora, patterns, LoRA+": {
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": "q_proj=2,mlp.down_proj=5",
        "alpha_pattern": "o_proj=3",
        "loraplus_lr_ratio": 4.0,
        "peer": {"loraplus": 4.0},
    },
    "rslora on the last layer": {"use_rslora": True, "num_layers": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_curves_are_pefts(kind: str, model: Path, data: Path, tmp_path: Path) -> None:
    off, losses = difference(
        model, data, tmp_path / "out", "adamw", "linear",
        iters=12, warmup_steps=3, batch_size=3, max_seq_length=32, **KINDS[kind],
    )  # fmt: skip
    assert off < 2e-5, off  # some float32 roundings of a loss of 5, grown over 12 updates
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", list(DATA))
@pytest.mark.parametrize("model", list(MODELS))
def test_curves_on_real_text_are_pefts(model: str, data: str, kind: str, tmp_path: Path) -> None:
    compared(model, data, "adamw", "cosine", tmp_path, **KINDS[kind])
