"""A model small enough that a case of it takes the time of its imports."""

from __future__ import annotations

from pathlib import Path

import pytest
import small


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's directory."""
    return small.write_small_model(tmp_path_factory.mktemp("model"))
