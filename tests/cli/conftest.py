"""What every command can run on."""

from __future__ import annotations

from pathlib import Path

import pytest
import small


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> Path:
    """An adapter that two updates have moved away from zero. Not to be written to."""
    out = tmp_path_factory.mktemp("trained") / "adapter"
    done = small.run(
        "train", "--model", model, "--data", data, "--adapter-path", out,
        "--iters", 2, "--max-seq-length", 32, "--learning-rate", 0.05,
    )  # fmt: skip
    assert done.code == 0, done.err
    return out
