"""Cores that may be used, by affinity, quota and topology; and how long threads spin."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lowtide.cores import spin_count, usable_cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight CPUs on four cores, in group /app of the second version, without a quota."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/app\n")
    (tmp_path / "groups" / "app").mkdir(parents=True)
    for cpu in range(8):
        topology = tmp_path / "cpus" / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    return tmp_path


def cores(machine: Path) -> int:
    return usable_cores(machine / "proc", machine / "groups", machine / "cpus")


def test_two_threads_of_a_core_count_once(machine: Path) -> None:
    assert cores(machine) == 4


def test_affinity_counts(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4})
    assert cores(machine) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000", 4), ("150000 100000", 1), ("200000 100000", 2), ("5000 100000", 1), ("?", 4)],
)
def test_a_quota_of_the_second_version(machine: Path, text: str, expected: int) -> None:
    (machine / "groups" / "app" / "cpu.max").write_text(text + "\n")
    assert cores(machine) == expected


def test_a_quota_of_a_group_above_counts(machine: Path) -> None:
    (machine / "groups" / "cpu.max").write_text("300000 100000\n")
    assert cores(machine) == 3


@pytest.mark.parametrize(("quota", "expected"), [(-1, 4), (200_000, 2)])
def test_a_quota_of_the_first_version(machine: Path, quota: int, expected: int) -> None:
    (machine / "proc" / "self" / "cgroup").write_text("3:cpu,cpuacct:/app\n2:memory:/app\n")
    group = machine / "groups" / "cpu,cpuacct" / "app"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    assert cores(machine) == expected


def test_threads_spin_where_nobody_else_runs(machine: Path) -> None:
    stat = machine / "proc" / "stat"
    stat.write_text("cpu 1 2 3\nprocs_running 1\n")
    idle = spin_count(machine / "proc")
    stat.write_text("cpu 1 2 3\nprocs_running 9\n")
    assert idle > 5 * spin_count(machine / "proc")
    stat.unlink()
    assert spin_count(machine / "proc") < idle


def test_this_machine() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
