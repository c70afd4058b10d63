"""The build script on a toy recipe: a loadable checkpoint, and the same bytes twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowtide.demo.assets import MODEL_FILES
from lowtide.demo.build import build
from lowtide.demo.muon import orthogonalized
from lowtide.demo.pretrain import Recipe

pytest.importorskip("transformers")

TOY = replace(
    Recipe(), vocab_size=300, hidden_size=24, intermediate_size=32, num_layers=1, num_heads=2,
    num_kv_heads=1, steps=3, batch_size=2, held_out=4, tokenizer_sample=300,
)  # fmt: skip


@pytest.fixture
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_the_same_recipe_makes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build(tmp_path / name, TOY)
    for name in (*MODEL_FILES, "README.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_muon_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 5, 17), (2, 17, 5)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)))
        assert ((values > 0.5) & (values < 1.5)).all()
