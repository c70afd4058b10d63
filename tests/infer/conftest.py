"""A small model, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import small

import lowtide as lt
from lowtide.model.decoder import Decoder


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    directory: Path = small.write_small_model(tmp_path_factory.mktemp("model"))
    return lt.load_model(directory, "float64")
