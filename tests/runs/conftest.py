"""A small model and data to train on, for a real run."""

from __future__ import annotations

from pathlib import Path

import pytest
import small


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"text": sentence} for sentence in small.SENTENCES]
    return small.write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)
