"""The cores that this process may use, and whether they are busy. Standard library only."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS, CPUS = Path("/proc"), Path("/sys/fs/cgroup"), Path("/sys/devices/system/cpu")
_LOOKS, _BETWEEN_S = 5, 0.002
_SPIN_IDLE, _SPIN_BUSY = 20_000, 2_000


def usable_cores(proc: Path = PROC, cgroups: Path = CGROUPS, cpus: Path = CPUS) -> int:
    """Cores that this process may use: real ones, of its affinity, within its groups' quota.

    Args:
        proc: where the kernel tells of itself.
        cgroups: where control groups are mounted.
        cpus: where it tells of its CPUs.

    Returns:
        At least 1. Two threads of one core count once.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(_all())
    cores = len({_siblings(cpus, cpu) for cpu in allowed})
    quotas = [quota for group in groups_of("cpu", proc, cgroups) for quota in _quota(group)]
    return max(1, int(min([cores, *quotas])))


def _all() -> int:
    return os.cpu_count() or 1


def _siblings(cpus: Path, cpu: int) -> str:
    """What names the core of a CPU: the CPUs on it."""
    try:
        return (cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota(group: Path) -> Iterator[float]:
    """Cores' worth of time that a group has, in either version of control groups."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return
    if quota.isdigit() and period.isdigit() and int(period):
        yield int(quota) / int(period)


def groups_of(controller: str, proc: Path = PROC, cgroups: Path = CGROUPS) -> Iterator[Path]:
    """Control groups of this process, from its own to the root.

    Args:
        controller: such as `memory`.
        proc: where the kernel tells of itself.
        cgroups: where control groups are mounted.

    Yields:
        Directories, which need not exist.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroups / controllers
        # In a container the path may be the host's, and the group itself is what is mounted.
        here = root / path.lstrip("/")
        for group in (here, *here.parents):
            yield group
            if group == root:
                break


def spin_count(proc: Path = PROC) -> int:
    """How often an OpenMP thread looks for work before it sleeps.

    A step is some 10,000 short parallel regions. Threads that sleep at once pay a wake-up each
    time: on an idle machine a step takes a third longer. Threads that spin while somebody else
    wants their core slow everything several times. So it depends on whether others are running now.

    Args:
        proc: where the kernel tells of itself.

    Returns:
        A number for GOMP_SPINCOUNT.
    """
    seen = []
    for look in range(_LOOKS):
        if look:
            time.sleep(_BETWEEN_S)
        try:
            found = re.search(r"^procs_running (\d+)", (proc / "stat").read_text(), re.MULTILINE)
        except OSError:
            return _SPIN_BUSY
        seen.append(int(found[1]) if found else 2)
    others = sorted(seen)[_LOOKS // 2] - 1  # we are running too
    return _SPIN_BUSY if others + usable_cores(proc) > _all() else _SPIN_IDLE
