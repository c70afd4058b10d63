"""What every mutated input is held to: our errors only, nothing written elsewhere, bounded memory.

Quick tests take a share of the inputs; `slow` ones take all. `FUZZ_INPUTS` sets how many.
"""

from __future__ import annotations

import inspect
import os
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from lowtide.errors import LowtideError
from lowtide.model import patterns

QUICK = 100
"""Inputs of a kind in the quick tests, or a multiple of it."""
_WRITING = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
}
_RAISES = {"os.system", "subprocess.Popen", "os.exec", "os.fork", "socket.connect"}
_MOST_TEXT = 20_000
"""Characters of a message; 20 problems are listed, each with the value that was found."""
_MOST_MEMORY = 400 << 20
"""Bytes that an input may add to the process's address space."""


class Watch:
    """Where files are written, from Python's audit events."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.outside: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event == "subprocess.Popen" and arguments[1][-1] == patterns.CHILD:
            return  # which has limits of its own, and only reads
        if event in _RAISES:
            self.outside.append(f"{event} {arguments[0]!r}")
        elif event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes:
                self._note(event, path)
        elif event in _WRITING:
            self._note(event, arguments[0])

    def _note(self, event: str, path: Any) -> None:
        assert self.inside is not None
        if isinstance(path, int):  # an open file, which was looked at when it was opened
            return
        if not os.path.abspath(os.fsdecode(path)).startswith(str(self.inside)):
            self.outside.append(f"{event} {path!r}")


WATCH = Watch()


class Judge:
    """Runs one input and sees how it ends."""

    def __init__(self, counts: Counter[str], directory: Path) -> None:
        self.counts, self._directory = counts, directory

    def __call__(self, action: Callable[[], object]) -> None:
        """It ends well, or with an error of ours that people can read."""
        refusal: LowtideError | None = None
        with _limited_memory():
            WATCH.inside, WATCH.outside = self._directory, []
            try:
                action()
            except LowtideError as error:
                refusal = error
            finally:
                WATCH.inside = None
        self.counts["accepted" if refusal is None else refusal.kind] += 1
        if refusal is not None:
            assert refusal.exit_code in (1, 2)
            assert 0 < len(str(refusal).strip()) <= _MOST_TEXT
        assert WATCH.outside == []


@contextmanager
def _limited_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + _MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def judging(name: str, directory: Path) -> Iterator[Judge]:
    """A judge, whose counts are printed at the end."""
    counts: Counter[str] = Counter()
    try:
        yield Judge(counts, directory)
    finally:
        said = ", ".join(f"{kind} {count:,}" for kind, count in counts.most_common())
        print(f"{name}: {sum(counts.values()):,} inputs: {said}")


def fuzz(
    check: Callable[..., None], strategy: SearchStrategy[Any], quick: int, many: int
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Two tests of one check: a quick one, and a slow one of many inputs.

    Args:
        check: takes an input first, then fixtures.
        strategy: makes inputs.
        quick: how many.
        many: how many in the slow one.

    Returns:
        Both, to be given names that begin with `test_`.
    """
    first = next(iter(inspect.signature(check).parameters))

    def test(count: int) -> Callable[..., None]:
        again = FunctionType(
            check.__code__, check.__globals__, check.__name__, None, check.__closure__
        )
        made: Callable[..., None] = inputs(count)(given(**{first: strategy})(again))
        return made

    return test(quick), pytest.mark.slow(test(many))


def inputs(count: int) -> settings:
    """So many inputs, the same ones each time."""
    return settings(
        max_examples=int(os.environ.get("FUZZ_INPUTS", count)),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
