"""A small model and data to train on."""

from __future__ import annotations

from pathlib import Path

import pytest
import small

import lowtide as lt
from lowtide.model.decoder import Decoder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"text": sentence} for sentence in small.SENTENCES]
    return small.write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture
def decoder(model: Path) -> Decoder:
    """The model in float64, where two ways to the same number differ by rounding only."""
    return lt.load_model(model, "float64")
