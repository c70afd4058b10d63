"""How much memory this process may still take before somebody is killed for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lowtide.cores import CGROUPS, PROC, groups_of

# (limit, usage) of the second and the first version of control groups.
_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def available_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """MemAvailable, or what the process's control group leaves where that is less.

    Args:
        proc: where the kernel tells of itself.
        cgroups: where control groups are mounted.

    Returns:
        Bytes. Half of the machine's memory on systems without /proc.
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    found = {name: int(rest.split()[0]) * 1024 for name, rest in (x.split(":", 1) for x in lines)}
    groups = groups_of("memory", proc, cgroups)
    return min([found["MemAvailable"], *(left for group in groups for left in _left_by(group))])


def is_memory(directory: Path, proc: Path = PROC) -> bool:
    """Whether files in a directory take memory instead of disk: on tmpfs or ramfs.

    Args:
        directory: exists.
        proc: where the kernel tells of itself.

    Returns:
        False too where the system does not say.
    """
    device = os.stat(directory).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = (proc / "self" / "mountinfo").read_text().splitlines()
    except OSError:
        return False
    # Fields of proc(5): ... major:minor at 2, and after a lone dash the type of the file system.
    kinds = (line.partition(" - ")[2].split()[0] for line in lines if line.split()[2] == number)
    return any(kind in ("tmpfs", "ramfs") for kind in kinds)


def _left_by(group: Path) -> Iterator[int]:
    """Limit less usage of one group; cached file pages can be dropped, and count as left."""
    for limit_file, usage_file in _FILES:
        try:
            limit = (group / limit_file).read_text().strip()
            usage = int((group / usage_file).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":
            # The first version counts groups below apart, under total_*.
            cached = (
                int(stat.get(f"total_{kind}_file", stat.get(f"{kind}_file", 0)))
                for kind in ("active", "inactive")
            )
            yield max(0, int(limit) - usage + sum(cached))
