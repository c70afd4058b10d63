"""How much memory is left, by the kernel's word and by limits of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lowtide.memory.available import available_bytes, is_memory

GB = 10**9
MEMINFO = "MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\nHugePages_Total:       0\n"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    root = tmp_path / "proc"
    (root / "self").mkdir(parents=True)
    (root / "meminfo").write_text(MEMINFO)
    return root


def group(directory: Path, limit: str, usage: int, cached: int = 0, first: bool = False) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    names = ("limit_in_bytes", "usage_in_bytes") if first else ("max", "current")
    (directory / f"memory.{names[0]}").write_text(f"{limit}\n")
    (directory / f"memory.{names[1]}").write_text(f"{usage}\n")
    (directory / "memory.stat").write_text(f"anon 5\nactive_file {cached}\ninactive_file 0\n")


def test_this_machine() -> None:
    assert 1_000_000 < available_bytes() < 2**50


def test_without_control_groups_it_is_memavailable(proc: Path, tmp_path: Path) -> None:
    assert available_bytes(proc, tmp_path / "none") == 8_000_000 * 1024
    (proc / "self" / "cgroup").write_text("0::/user/app\n")
    assert available_bytes(proc, tmp_path / "none") == 8_000_000 * 1024


@pytest.mark.parametrize("place", ["", "user", "user/app"])
def test_the_tightest_limit_on_the_way_counts(proc: Path, tmp_path: Path, place: str) -> None:
    (proc / "self" / "cgroup").write_text("0::/user/app\n")
    groups = tmp_path / "groups"
    group(groups / "user" / "app", "max", 1 * GB)
    group(groups / place, str(4 * GB), 3 * GB, cached=GB // 2)
    assert available_bytes(proc, groups) == GB + GB // 2


def test_the_first_version_of_control_groups(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("9:name=x:/\n4:memory:/app\n2:cpu:/other\n0::/\n")
    groups = tmp_path / "groups"
    group(groups / "memory" / "app", str(2 * GB), GB, first=True)
    group(groups / "memory", str(2**63 - 4096), 7 * GB, first=True)
    assert available_bytes(proc, groups) == GB


def test_a_groups_path_of_the_host_falls_back_to_what_is_mounted(
    proc: Path, tmp_path: Path
) -> None:
    (proc / "self" / "cgroup").write_text("0::/docker/abc\n")
    group(tmp_path / "groups", str(GB), GB + 5)
    assert available_bytes(proc, tmp_path / "groups") == 0


def test_without_proc_half_of_the_machine(tmp_path: Path) -> None:
    assert available_bytes(tmp_path / "nothing") > 100_000_000


@pytest.mark.parametrize(("kind", "expected"), [("tmpfs", True), ("ramfs", True), ("ext4", False)])
def test_the_file_system_of_a_directory(
    proc: Path, tmp_path: Path, kind: str, expected: bool
) -> None:
    device = tmp_path.stat().st_dev
    (proc / "self" / "mountinfo").write_text(
        "22 1 0:999 / /elsewhere rw - tmpfs none rw\n"
        f"23 1 {os.major(device)}:{os.minor(device)} / / rw,relatime shared:1 - {kind} /dev/x rw\n"
    )
    assert is_memory(tmp_path, proc) == (kind != "ext4")


def test_the_kernels_own_word_on_tmpfs() -> None:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "tmpfs" and Path(place).is_dir():
            assert is_memory(Path(place))
            return
    assert not is_memory(Path("/"))


def test_without_proc_no_directory_is_memory(tmp_path: Path) -> None:
    assert not is_memory(tmp_path, tmp_path / "none")


def test_files_of_groups_below_are_counted_too_in_the_first_version(
    proc: Path, tmp_path: Path
) -> None:
    (proc / "self" / "cgroup").write_text("4:memory:/app\n")
    here = tmp_path / "groups" / "memory" / "app"
    group(here, str(2 * GB), GB, first=True)
    (here / "memory.stat").write_text(
        f"active_file 0\ninactive_file 5\ntotal_active_file 7\ntotal_inactive_file {GB // 2}\n"
    )
    assert available_bytes(proc, tmp_path / "groups") == GB + GB // 2 + 7
