"""Cases: what is measured, each in a fresh process, each recorded whatever becomes of it."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowtide.command import lowtide_command
from lowtide.environment import differences, environment
from lowtide.errors import LowtideError
from lowtide.memory.available import available_bytes

from .child import SkippedError, flags_of, run_child
from .predict import needed_bytes
from .results import (
    CaseResult,
    case_path,
    make_directory,
    read_result,
    read_results,
    write_result,
)
from .shapes import cache_directory, shape_directory

Run = Callable[[Mapping[str, Any], Path], dict[str, Any]]
"""Measures a case: its settings with `model` a directory, and a directory for temporary files."""


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: unique in a results directory.
        group: which table or plot it is for.
        kind: how it is measured, a key of the runner's `kinds`.
        settings: all that decides the result; `shape` or None, and `model`, among them.
        rounds: how often it is measured, taking turns with the other cases.
    """

    name: str
    group: str
    kind: str
    settings: dict[str, Any]
    rounds: int = 1


@dataclass
class Summary:
    """How the cases of a run ended; names by ending."""

    done: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def add(self, ending: str, name: str) -> None:
        """Count a case once; how its last round ended is what counts, kept rounds least."""
        lists = (self.done, self.kept, self.failed, self.skipped)
        if ending == "kept" and any(name in names for names in lists):
            return
        for names in lists:
            if name in names:
                names.remove(name)
        getattr(self, ending).append(name)

    def text(self) -> str:
        """One line for people."""
        counts = [
            (self.done, "measured"),
            (self.kept, "kept from before"),
            (self.skipped, "skipped"),
            (self.failed, "failed"),
        ]
        return ", ".join(f"{len(names)} {word}" for names, word in counts if names) or "no cases"


def command_kind(*words: str) -> Run:
    """A kind of case that one lowtide command measures, its settings being that command's."""

    def run(settings: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
        return run_child(lowtide_command(*words, *flags_of(settings)), scratch)

    return run


class Runner:
    """Runs cases one after the other into a results directory."""

    def __init__(
        self,
        directory: Path,
        kinds: Mapping[str, Run],
        say: Callable[[str], None],
        cache_dir: str | None = None,
    ) -> None:
        """Note what holds for all cases, the environment among it.

        Args:
            directory: of the results.
            kinds: how each kind of case is measured.
            say: told of progress.
            cache_dir: where shapes' weights are; None means the default.
        """
        self._directory, self._kinds, self._say = directory, kinds, say
        self._cache = cache_directory(cache_dir)
        self._environment = environment()

    def run(self, cases: Sequence[Case]) -> Summary:
        """Measure what is not there yet.

        Args:
            cases: in the order in which they are measured.

        Returns:
            How each ended. Failed and skipped cases are recorded and do not stop the others.

        Raises:
            OutputError: the directory cannot be written.
            KeyboardInterrupt: what was measured until then is recorded.
        """
        summary = Summary()
        make_directory(self._directory)
        most = max((case.rounds for case in cases), default=0)
        turns = [(turn, case) for turn in range(1, most + 1) for case in cases]
        turns = [(turn, case) for turn, case in turns if turn <= case.rounds]
        stopped: set[str] = set()
        for number, (turn, case) in enumerate(turns, 1):
            if case.name in stopped:
                continue
            of_rounds = f", round {turn} of {case.rounds}" if case.rounds > 1 else ""
            self._say(f"[{number}/{len(turns)}] {case.name}{of_rounds}")
            before = self._before(case, turn)
            if before is not None and n_rounds(before) >= turn:
                summary.add("kept", case.name)
                continue
            started = time.perf_counter()
            try:
                result = self._twin(case, turn) or self._measured(case, before)
            except KeyboardInterrupt:
                left = len({one.name for _, one in turns[number - 1 :]} - stopped)
                self._say(
                    f"    stopped; {left} of {len(cases)} cases are left. The same command goes on "
                    f"with them; what is measured is in {self._directory}."
                )
                raise
            write_result(self._directory, result)
            summary.add(result.status, case.name)
            if result.status != "done":
                stopped.add(case.name)
            self._say(f"    {_line(result)}  ({time.perf_counter() - started:.0f} s)")
        self._say(f"{summary.text()}; results in {self._directory}")
        return summary

    def _before(self, case: Case, turn: int) -> CaseResult | None:
        """What is there of the case and can be used, or None."""
        path = case_path(self._directory, case.name)
        if not path.exists():
            return None
        try:
            before = read_result(path)
        except LowtideError as error:
            self._say(f"    measured again: {error}")
            return None
        if before.result is None:
            return None
        if (before.kind, before.case) != (case.kind, _plain(case.settings)):
            self._say("    measured again: the settings of the case changed")
            return None
        changed = differences(before.environment, self._environment)
        if changed:
            self._say(f"    measured again: {'; '.join(changed)}")
            return None
        revision = before.environment.get("git_revision")
        other = revision != self._environment["git_revision"]
        if other and n_rounds(before) < case.rounds:
            self._say(f"    measured again: its rounds so far are of revision {revision}")
            return None
        if n_rounds(before) < turn:
            return before
        text = "done before, kept"
        if other:
            text += f" (at revision {revision}; remove {path} to measure it again)"
        self._say(f"    {text}")
        return before

    def _twin(self, case: Case, turn: int) -> CaseResult | None:
        """The result of a case of another group with the same settings, under this one's name."""
        try:
            others = read_results(self._directory).values()
        except LowtideError:  # an unreadable file says so when its own turn comes
            return None
        for other in others:
            same = (other.kind, other.case) == (case.kind, _plain(case.settings))
            same = same and other.status == "done" and other.environment == self._environment
            if same and n_rounds(other) >= turn:
                self._say(f"    the same settings as {other.name}: its figures are used")
                return replace(other, name=case.name, group=case.group)
        return None

    def _measured(self, case: Case, before: CaseResult | None) -> CaseResult:
        """Measure the case now, beside earlier rounds; a failure becomes a result that says so."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        status, error = "done", None
        result = None if before is None else before.result
        try:
            result = with_round(result, self._result(case))
        except SkippedError as missing:
            status, error = "skipped", str(missing)
        except LowtideError as failure:
            status, error = "failed", str(failure)
        return CaseResult(
            case.name, case.group, case.kind, status, error,
            _plain(case.settings), self._environment, started, result,
        )  # fmt: skip

    def _result(self, case: Case) -> dict[str, Any]:
        settings = dict(case.settings)
        check_memory(case)
        shape = settings.get("shape")
        if shape is not None:
            settings["model"] = str(
                shape_directory(shape, self._cache, lambda text: self._say(f"    {text}"))
            )
        with tempfile.TemporaryDirectory(prefix="lowtide-bench-") as scratch:
            result = self._kinds[case.kind](settings, Path(scratch))
        if "model" in result:  # a directory on this machine says less than the shape's name
            result["model"] = case.settings["model"]
        return result


def n_rounds(result: CaseResult) -> int:
    """How many rounds a result holds."""
    return len((result.result or {}).get("rounds", [None]))


def with_round(before: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """A case's result with one more round.

    Args:
        before: the result so far, or None.
        new: what the round measured.

    Returns:
        The median over the rounds of every figure, and the rest from the last round; from the
        second round on, `rounds` holds them all.
    """
    if before is None:
        return new
    rounds = [*before.get("rounds", [before]), new]
    merged = dict(new)
    for name, value in new.items():
        values = [one.get(name) for one in rounds]
        if all(type(one) in (int, float) for one in values):
            median = statistics.median(values)
            merged[name] = round(median) if isinstance(value, int) else median
    return {**merged, "rounds": rounds}


def check_memory(case: Case) -> None:
    """Refuse a case that the memory which is free now cannot hold.

    Args:
        case: what is about to start.

    Raises:
        LowtideError: says what it needs and what there is.
        ModelError: its model cannot be used.
    """
    needed, available = needed_bytes(case.kind, case.settings), available_bytes()
    if needed > available:
        raise LowtideError(
            f"not started: the case needs about {needed / 1e6:,.0f} MB of memory, and "
            f"{available / 1e6:,.0f} MB are available. End other programs, or measure a smaller "
            "model or a shorter sequence."
        )


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _line(result: CaseResult) -> str:
    """The figures of a case, or why it has none."""
    if result.result is None:
        return f"{result.status}: {result.error}"
    one = result.result
    parts = []
    if "peak_anon_bytes" in one:
        parts.append(f"peak_anon {one['peak_anon_bytes'] / 1e6:,.1f} MB")
    parts += [f"{name[:-2]} {one[name]:.2f} s" for name in ("wall_s", "cpu_s") if name in one]
    if "peak" in one:
        where, peak = one["peak"]["where"], one["peak"]["rss_anon_bytes"]
        parts.append(f"peak {peak / 1e6:,.1f} MB at {where}")
    if one.get("curve"):
        first, last = one["curve"][0], one["curve"][-1]
        parts.append(
            f"loss {first['loss']:.3f} -> {last['loss']:.3f} in {last['step']} steps, "
            f"{last['wall_s']:.1f} s"
        )
    if "overall" in one:
        cosines = (f"{k}: {v['cosine']:.4f}" for k, v in one["overall"].items())
        parts.append(f"cosine by directions {', '.join(cosines)}")
    return "  ".join(parts)
