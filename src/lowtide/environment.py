"""What a figure was measured on: machine, system, library versions, revision of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import lowtide

SAME_MACHINE = ("lowtide", "python", "torch", "platform", "cpu", "cores", "memory_bytes", "threads")
"""What must be equal for two figures to stand side by side. The revision is what is compared."""


def environment() -> dict[str, Any]:
    """The environment of this process.

    Returns:
        `lowtide`, `git_revision` (None outside a checkout), `python`, `torch`, `platform`, `cpu`,
        `cores` (those that this process may use), `memory_bytes`, `threads`.
    """
    return {
        "lowtide": lowtide.__version__,
        "git_revision": git_revision(Path(__file__)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": " ".join([platform.system(), platform.machine(), *platform.libc_ver()]).strip(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory_bytes(),
        "threads": torch.get_num_threads(),
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs between two environments, the revision of the code aside.

    Args:
        one: an environment.
        other: the one beside it.

    Returns:
        One text per difference, such as `torch: 2.13.0 and 2.14.0`.
    """
    return [
        f"{name}: {one.get(name)} and {other.get(name)}"
        for name in SAME_MACHINE
        if one.get(name) != other.get(name)
    ]


def git_revision(file: Path) -> str | None:
    """The commit that a source file belongs to, `-dirty` after it when tracked files differ.

    Args:
        file: a file of the package; one that git does not track belongs to no commit.

    Returns:
        The commit, or None.
    """
    tracked = _git(file.parent, "ls-files", "--error-unmatch", file.name)
    if tracked is None:
        return None
    return _git(file.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:  # no git here
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model", "Hardware"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
