"""Cases one by one: what is recorded, kept, retried, refused, and left by an interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small

from lowtide.bench import case as cases
from lowtide.bench.case import Case, Runner, command_kind
from lowtide.bench.child import SkippedError, flags_of, run_child
from lowtide.bench.results import case_path, read_result, write_result
from lowtide.errors import LowtideError, OutputError

FIGURES = {"peak_anon_bytes": 50_000_000, "wall_s": 1.0, "cpu_s": 2.0}


class Bench:
    """A results directory with cases of a kind that only pretends to measure."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory, self.model = directory, model
        self.said: list[str] = []
        self.measured: list[str] = []
        self.walls: list[float] = []
        self.broken: set[str] = set()

    def case(self, name: str, group: str = "models", **settings: Any) -> Case:
        own = {"shape": None, "model": str(self.model), "method": "mesp", "does": name}
        return Case(name, group, "step", {**own, **settings})

    def run(self, *wanted: Case) -> cases.Summary:
        self.said.clear()
        self.measured.clear()
        runner = Runner(self.directory, {"step": self._measure}, self.said.append)
        return runner.run(wanted)

    def _measure(self, settings: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
        does = settings["does"]
        self.measured.append(does)
        if does == "fails" or does in self.broken:
            raise LowtideError("it broke")
        if does == "absent":
            raise SkippedError("peer is not installed")
        if does == "interrupted":
            raise KeyboardInterrupt
        return {**FIGURES, "wall_s": self.walls.pop(0)} if self.walls else dict(FIGURES)


@pytest.fixture
def bench(tmp_path: Path, model: Path) -> Bench:
    return Bench(tmp_path / "out", model)


def test_a_failed_case_is_recorded_and_the_others_go_on(bench: Bench) -> None:
    names = ["a", "fails", "absent", "b"]
    summary = bench.run(*map(bench.case, names))
    assert (summary.done, summary.failed, summary.skipped) == (["a", "b"], ["fails"], ["absent"])
    read = {name: read_result(case_path(bench.directory, name)) for name in names}
    assert (read["fails"].status, read["fails"].error) == ("failed", "it broke")
    assert (read["absent"].status, read["absent"].error) == ("skipped", "peer is not installed")
    assert read["b"].result == FIGURES
    assert "[2/4] fails" in bench.said
    assert any(line.startswith("    failed: it broke") for line in bench.said)
    assert summary.text() == "2 measured, 1 skipped, 1 failed"


def test_a_second_run_measures_what_is_not_done(bench: Bench) -> None:
    bench.run(*map(bench.case, ("a", "fails")))
    summary = bench.run(*map(bench.case, ("a", "fails", "b")))
    assert bench.measured == ["fails", "b"]
    assert summary.kept == ["a"]
    assert "    done before, kept" in bench.said


def test_other_settings_or_another_environment_are_measured_again(bench: Bench) -> None:
    bench.run(bench.case("a"))
    bench.run(bench.case("a", seq_len=16))
    assert bench.measured == ["a"]
    assert "    measured again: the settings of the case changed" in bench.said
    done = read_result(case_path(bench.directory, "a"))
    write_result(bench.directory, replace(done, environment={**done.environment, "torch": "1.0"}))
    bench.run(bench.case("a", seq_len=16))
    assert bench.measured == ["a"]
    assert any("measured again: torch: 1.0 and " in line for line in bench.said)


def test_a_case_of_another_revision_is_kept_and_says_so(bench: Bench) -> None:
    bench.run(bench.case("a"))
    done = read_result(case_path(bench.directory, "a"))
    older = {**done.environment, "git_revision": "0123abc"}
    write_result(bench.directory, replace(done, environment=older))
    assert bench.run(bench.case("a")).kept == ["a"]
    assert any("at revision 0123abc; remove " in line for line in bench.said)


def test_a_broken_file_is_measured_again(bench: Bench) -> None:
    bench.run(bench.case("a"))
    case_path(bench.directory, "a").write_text("{")
    assert bench.run(bench.case("a")).done == ["a"]
    assert any("cannot be read as a result" in line for line in bench.said)


def test_equal_cases_of_two_groups_are_measured_once(bench: Bench) -> None:
    one = bench.case("a")
    other = Case("again", "rank", "step", one.settings)
    assert bench.run(one, other).done == ["a", "again"]
    assert bench.measured == ["a"]
    copied = read_result(case_path(bench.directory, "again"))
    assert (copied.group, copied.result) == ("rank", FIGURES)
    assert "    the same settings as a: its figures are used" in bench.said


def test_rounds_take_turns_and_medians_are_kept(bench: Bench) -> None:
    a, b = (replace(bench.case(name), rounds=3) for name in "ab")
    once = bench.case("once")
    bench.walls = [3.0, 1.0, 1.0, 5.0, 1.0, 4.0, 1.0]
    summary = bench.run(a, b, once)
    assert bench.measured == ["a", "b", "once", "a", "b", "a", "b"]
    assert summary.done == ["once", "a", "b"]
    result = read_result(case_path(bench.directory, "a")).result
    assert result is not None
    assert result["wall_s"] == 4.0
    assert [one["wall_s"] for one in result["rounds"]] == [3.0, 5.0, 4.0]
    assert result["peak_anon_bytes"] == FIGURES["peak_anon_bytes"]
    assert bench.run(a, b, once).kept == ["a", "b", "once"]
    assert bench.measured == []


def test_missing_rounds_are_added_unless_the_program_changed(bench: Bench) -> None:
    bench.run(bench.case("a"))
    more = replace(bench.case("a"), rounds=2)
    assert bench.run(more).done == ["a"]
    assert bench.measured == ["a"]
    done = read_result(case_path(bench.directory, "a"))
    assert done.result is not None
    assert len(done.result["rounds"]) == 2
    write_result(
        bench.directory, replace(done, environment={**done.environment, "git_revision": "0123abc"})
    )
    bench.run(replace(more, rounds=3))
    assert bench.measured == ["a", "a", "a"]
    assert any("its rounds so far are of revision 0123abc" in line for line in bench.said)


def test_a_failure_in_a_later_round_keeps_the_earlier_ones(bench: Bench) -> None:
    bench.run(bench.case("a"))
    bench.broken = {"a"}
    more = replace(bench.case("a"), rounds=3)
    assert bench.run(more).failed == ["a"]
    assert bench.measured == ["a"]
    failed = read_result(case_path(bench.directory, "a"))
    assert (failed.status, failed.error) == ("failed", "it broke")
    bench.broken = set()
    assert bench.run(more).done == ["a"]
    assert bench.measured == ["a", "a"]


def test_an_equal_case_has_the_rounds_of_its_twin(bench: Bench) -> None:
    one = replace(bench.case("a"), rounds=2)
    other = Case("again", "rank", "step", one.settings, rounds=2)
    bench.run(one, other)
    assert bench.measured == ["a", "a"]
    results = [read_result(case_path(bench.directory, name)).result for name in ("a", "again")]
    assert results[0] == results[1]


def test_too_little_memory_fails_the_case_before_it_starts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "available_bytes", lambda: 2_000_000_000)
    large = bench.case("large", shape="qwen2.5-3b", model="qwen2.5-3b", method="autograd")
    summary = bench.run(large, bench.case("a"))
    assert (summary.failed, bench.measured) == (["large"], ["a"])
    error = read_result(case_path(bench.directory, "large")).error
    assert error is not None
    assert error.startswith("not started: the case needs about ")
    assert "2,000 MB are available" in error


def test_a_shape_that_cannot_be_written_fails_its_case(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Path:
        raise OutputError("the disk is full")

    monkeypatch.setattr(cases, "shape_directory", full)
    shape = bench.case("shape", shape="smollm2-135m", model="smollm2-135m")
    summary = bench.run(shape, bench.case("a"))
    assert (summary.failed, summary.done) == (["shape"], ["a"])
    assert read_result(case_path(bench.directory, "shape")).error == "the disk is full"


def test_an_interruption_keeps_what_is_done(bench: Bench) -> None:
    with pytest.raises(KeyboardInterrupt):
        bench.run(*map(bench.case, ("a", "interrupted", "b")))
    assert set(small.tree(bench.directory)) == {"cases", "cases/a.json"}
    assert any("stopped; 2 of 3 cases are left" in line for line in bench.said)


def test_an_output_that_cannot_be_written_is_refused_first(bench: Bench) -> None:
    bench.directory.write_text("a file")
    with pytest.raises(OutputError, match="cannot be written"):
        bench.run(bench.case("a"))
    assert bench.measured == []


def test_a_real_step_in_a_fresh_process(bench: Bench) -> None:
    runner = Runner(bench.directory, {"step": command_kind("bench", "step")}, bench.said.append)
    settings = {"shape": None, "model": str(bench.model), "seq_len": 8, "steps": 1}
    runner.run(
        [
            Case("good", "models", "step", {**settings, "method": "mebp", "mebp_loss": "full"}),
            Case("bad", "models", "step", {**settings, "method": "mezo", "mebp_loss": "full"}),
        ]
    )
    good, bad = (read_result(case_path(bench.directory, name)) for name in ("good", "bad"))
    assert good.result is not None
    assert (good.result["method"], good.result["mebp_loss"]) == ("mebp", "full")
    assert good.result["model"] == str(bench.model)
    assert bad.error is not None
    assert "--mebp-loss belongs to mebp, not to mezo" in bad.error


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL .*It said nothing"),
        (
            "import sys, os; print('at layer 3', file=sys.stderr, flush=True); os.kill(0, 15)",
            "ended by SIGTERM. Its last message: at layer 3",
        ),
        ("raise ValueError('odd')", "exit code 1. Its last message: ValueError: odd"),
        ("print('no json')", "exit code 0. It said nothing"),
        ('print(\'{"error": "no such model", "kind": "X"}\'); exit(2)', "^no such model$"),
    ],
)
def test_a_child_that_gives_no_result(tmp_path: Path, code: str, error: str) -> None:
    with pytest.raises(LowtideError, match=error):
        run_child(python(code), tmp_path)


def test_a_child_may_say_a_lot(tmp_path: Path) -> None:
    code = "import json, sys; sys.stderr.write('x' * 10**6); print(json.dumps({'a': 'y' * 10**6}))"
    assert len(run_child(python(code), tmp_path)["a"]) == 10**6


def test_flags_of_settings() -> None:
    settings = {"shape": "x", "model": "m", "recompute_h": False, "mask_prompt": True}
    assert flags_of({**settings, "threads": None, "lora_r": 4}) == [
        "--model=m",
        "--no-recompute-h",
        "--mask-prompt",
        "--lora-r=4",
    ]


_INTERRUPTED = """
import sys
from pathlib import Path
from lowtide.bench import paper
from lowtide.bench.case import Case
from lowtide.bench.child import run_child
from lowtide.cli.main import main

model, out = sys.argv[1:]

def quick(settings, scratch):
    return {"wall_s": 1.0}

def endless(settings, scratch):
    code = f"import os, time; open({out + '.pid'!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    return run_child([sys.executable, "-c", code], scratch)

own = {"shape": None, "model": model, "method": "mesp"}
paper.KINDS.update(step=quick, peer=endless)
paper.paper_cases = lambda settings: [
    Case("first", "models", "step", own), Case("second", "peers", "peer", own)
]
sys.exit(main(["bench", "paper", "--out", out]))
"""


def test_ctrl_c_ends_the_child_and_leaves_finished_cases(tmp_path: Path, model: Path) -> None:
    out, pid = tmp_path / "out", tmp_path / "out.pid"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [*python(_INTERRUPTED), str(model), str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=small.environment(TMPDIR=str(scratch)), start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)  # to lowtide only: its child is its own to end
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "lowtide: interrupted.\n"
    assert "stopped; 1 of 2 cases are left. The same command goes on" in text
    assert set(small.tree(out)) == {"cases", "cases/first.json"}
    assert list(scratch.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_case_file_is_plain_json(bench: Bench) -> None:
    bench.run(bench.case("a", target_modules=("q_proj", "v_proj")))
    document = json.loads(case_path(bench.directory, "a").read_text())
    assert document["case"]["target_modules"] == ["q_proj", "v_proj"]
    assert bench.run(bench.case("a", target_modules=("q_proj", "v_proj"))).kept == ["a"]
