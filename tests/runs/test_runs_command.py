"""`lowtide runs`: finds, compares, sorts, and survives what is damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import small
from made_runs import END, START, update, write_run

from lowtide.runs.find import SORTS
from lowtide.runs.processes import process_identity


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    top = tmp_path / "runs"
    write_run(top / "b" / "slow", [update(s, elapsed_s=100.0 * s) for s in range(1, 6)])
    write_run(
        top / "a", [*map(update, range(1, 10)), {"step": 9, "valid_loss": 1.5}],
        [START, {**END, "state": "failed", "error": "it was nan"}],
    )  # fmt: skip
    alive = {**START, "process": process_identity(os.getpid())}
    write_run(top / "going", [update(1, peak_anon_bytes=10**7)], [alive])
    write_run(top / "resting", [update(1)], [alive, {"event": "paused", "step": 1}])
    write_run(top / "killed", [update(1), '{"step": 2,'], [START])
    write_run(top / ".hidden", [update(1)])
    (top / "zeros").mkdir()
    (top / "zeros" / "metrics.jsonl").write_bytes(b"\0" * 5000)
    (top / "old").mkdir()
    (top / "old" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.25}\n')
    (top / "empty").mkdir()
    (top / "link").symlink_to(top)
    return top


def test_each_run_has_a_row_with_its_state(runs: Path) -> None:
    outcome = small.run("runs", runs, "--json")
    assert outcome.code == 0, outcome.err
    rows = {row["name"]: row for row in outcome.document["runs"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        "a": "failed", "b/slow": "finished", "going": "running", "resting": "paused",
        "killed": "interrupted", "zeros": "unknown", "old": "unknown",
    }  # fmt: skip
    assert rows["a"]["best_valid_loss"] == 1.5
    assert rows["a"]["loss"] == update(9)["loss"]
    assert rows["b/slow"]["elapsed_s"] == 500
    assert rows["b/slow"]["peak_anon_bytes"] == 30_000_005
    assert (rows["a"]["model"], rows["a"]["method"], rows["a"]["iters"]) == ("tiny", "mesp", 9)
    assert (rows["killed"]["damaged_lines"], rows["zeros"]["damaged_lines"]) == (1, 1)
    assert rows["old"]["loss"] == 3.25
    assert rows["old"]["best_valid_loss"] is None


def test_the_table_is_for_people(runs: Path) -> None:
    outcome = small.run("runs", runs)
    lines = outcome.out.splitlines()
    assert lines[0].split() == [
        "name", "state", "model", "method", "steps", "loss", "valid", "time", "tokens", "memory",
    ]  # fmt: skip
    assert len(lines) == 9
    row = next(line for line in lines if line.startswith("b/slow"))
    assert row.split()[:5] == ["b/slow", "finished", "tiny", "mesp", "5/9"]
    assert "8m 20s" in row
    assert lines[-1] == "2 damaged line(s) were left out"
    assert len({len(line) for line in lines[:-1]}) == 1


@pytest.mark.parametrize("sort", list(SORTS))
def test_order(runs: Path, sort: str) -> None:
    rows = small.run("runs", runs, "--sort", sort, "--json").document["runs"]
    assert len(rows) == 7
    firsts = {
        "name": "a", "loss": "a", "valid": "a", "steps": "a", "tokens": "a", "memory": "going",
    }  # fmt: skip
    if sort in firsts:
        assert rows[0]["name"] == firsts[sort]
    if sort in ("loss", "valid", "time", "memory"):
        assert rows[-1]["name"] == "zeros"


def test_the_directory_itself_may_be_a_run(runs: Path) -> None:
    rows = small.run("runs", runs / "a", "--json").document["runs"]
    assert [row["name"] for row in rows] == ["a"]


def test_where_nothing_is(tmp_path: Path) -> None:
    outcome = small.run("runs", tmp_path)
    assert outcome.code == 0
    assert (
        outcome.out
        == f"no run below {tmp_path}; `lowtide train` writes one to its --adapter-path\n"
    )
    outcome = small.run("runs", tmp_path / "absent")
    assert outcome.code == 2
    assert f"{tmp_path / 'absent'} is not there; expected a directory" in outcome.err
    outcome = small.run("runs", tmp_path, "--sort", "beauty")
    assert outcome.code == 2
    assert "choose name, state, model" in outcome.err
