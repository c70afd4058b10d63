"""Every family of the registry, and a made-up one, with every one of its examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import made_up
import pytest
from made_up import ALL

from lowtide.check.conformance import Errors, Example, measure
from lowtide.model.families import FAMILIES

CASES = [(name, place) for name, family in ALL.items() for place in range(len(family.examples))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take a `case` or a `family` are run on each.

    What loads transformers' models is quick on the first example of each, and slow on the others.
    """
    if "case" in metafunc.fixturenames:
        slow = "measured" in metafunc.fixturenames
        metafunc.parametrize(
            "case",
            [
                pytest.param(case, marks=[pytest.mark.slow] if slow and case[1] else [])
                for case in CASES
            ],
            ids=[f"{name}-{place}" for name, place in CASES],
        )
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", sorted(ALL))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up family is in the registry here, and nowhere else."""
    monkeypatch.setitem(FAMILIES, made_up.NAME, made_up.FAMILY)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, int]], Example]:
    """Writes each example once."""
    made: dict[tuple[str, int], Example] = {}

    def write(case: tuple[str, int]) -> Example:
        if case not in made:
            directory: Path = tmp_path_factory.mktemp(case[0])
            made[case] = Example.write(directory, ALL[case[0]].examples[case[1]])
        return made[case]

    return write


@pytest.fixture
def example(case: tuple[str, int], written: Callable[[tuple[str, int]], Example]) -> Example:
    """The case's model on disk."""
    return written(case)


@pytest.fixture(scope="session")
def measured() -> Callable[[Example], Errors]:
    """Measures each example once."""
    known: dict[Path, Errors] = {}

    def find(example: Example) -> Errors:
        if example.directory not in known:
            known[example.directory] = measure(example)
        return known[example.directory]

    return find
