"""Whether the process that made a run is still there."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def process_identity(pid: int, proc: Path = Path("/proc")) -> dict[str, Any] | None:
    """What names one process of one boot, and no later one that gets its number.

    Args:
        pid: of the process.
        proc: where the kernel tells of its processes.

    Returns:
        `pid`, `started` (clock ticks since boot), `boot` (the boot's id); None where there is no
        such process, or the system does not tell.
    """
    try:
        # proc(5): the name in parentheses may hold anything; the 20th field after it is the start.
        stat = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
        boot = (proc / "sys" / "kernel" / "random" / "boot_id").read_text().strip()
    except OSError:
        return None
    return {"pid": pid, "started": int(stat[19]), "boot": boot}
