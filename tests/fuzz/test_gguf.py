"""GGUF files whose headers lie: refused, or opened and usable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_files import all_in, random_weights, write
from hypothesis import given
from hypothesis import strategies as st
from judging import QUICK, Judge, inputs
from mutated_gguf import Good, files
from small import CONFIG

import lowtide as lt
from lowtide.model.families import spec_from_config


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    """A model with a vocabulary, whose tokens need not be read for it to be used."""
    path = tmp_path_factory.mktemp("good") / "good.gguf"
    tokens = [f"<{i}>" for i in range(CONFIG["vocab_size"])]
    more = {"tokenizer.ggml.tokens": tokens, "general.name": "made up", "general.tags": [1.5, 2.5]}
    write(
        path, CONFIG, random_weights(spec_from_config(CONFIG).tensor_shapes()), all_in("Q4_0"), more
    )
    return Good.read(path)


def _open(data: st.DataObject, judge: Judge, directory: Path, good: Good) -> None:
    path = directory / "model.gguf"
    path.write_bytes(data.draw(files(good)))

    def use() -> None:
        model = lt.load_model(path)
        found = lt.logits(model, None, [1, 2, 3])
        assert found.shape == (3, model.spec.vocab_size)
        assert found.dtype == torch.float32

    judge(use)


@pytest.fixture
def cached_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unpacked_here: None) -> Path:
    """The cache lies in the test's directory, where it may be written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@given(data=st.data())
@inputs(QUICK * 3)
def test_gguf_files(data: st.DataObject, judge: Judge, cached_inside: Path, good: Good) -> None:
    _open(data, judge, cached_inside, good)


@pytest.mark.slow
@given(data=st.data())
@inputs(20_000)
def test_many_gguf_files(
    data: st.DataObject, judge: Judge, cached_inside: Path, good: Good
) -> None:
    _open(data, judge, cached_inside, good)
