"""Every input of these tests goes through a judge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from judging import Judge, judging


@pytest.fixture
def judge(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Judge]:
    """It looks for what is written outside the test's directory."""
    with judging(request.node.name, tmp_path) as one:
        yield one
