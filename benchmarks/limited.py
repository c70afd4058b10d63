#!/usr/bin/env python3
"""Training steps in a memory control group, beside the same steps without a limit.

    sudo python3 benchmarks/limited.py --memory-limit 384MiB -- --model qwen2.5-0.5b --seq-len 256

What follows `--` are flags of `lowtide bench step`. The group counts page cache (a file's page is
charged to the group that reads it first), and swap is off in it. So that nothing is read for free,
the cached pages of the weights and of Python's and torch's libraries are dropped before the limited
run; what other processes hold mapped cannot be dropped, and is reported. Then the same runs without
a limit. The losses of all steps and the adapter after them must be equal bit for bit.

Exit code 0: they are, and nothing was killed. 1: not so. 2: no control group can be had, and why.
130: interrupted.

Only Python's standard library is used, so that this process holds nothing of torch in memory.
Linux, root, control groups of the first or the second version.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup")
SHAPES = Path("~/.cache/lowtide/shapes")
_FAILURES = ("memory.failcnt", "memory.memsw.failcnt")
_POLL_S = 0.2
_PATIENCE_S = 5.0
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Unavailable(Exception):
    """No control group can be had here; the message says why."""


@dataclass
class Group:
    """A memory control group, in the words of its version.

    Attributes:
        directory: of the group.
        peak: file with the highest usage.
        usages: the highest of each sum of `memory.stat` that was seen, in bytes.
    """

    directory: Path
    peak: str
    usages: dict[str, int] = field(default_factory=dict)

    def look(self) -> None:
        """Note what the group holds now: private memory, page cache, mapped page cache."""
        stat = table(self.directory / "memory.stat")
        for name, keys in (
            ("anon", ("anon", "rss")),
            ("cache", ("file", "cache")),
            ("mapped", ("file_mapped", "mapped_file")),
        ):
            now = next((stat[key] for key in keys if key in stat), 0)
            self.usages[name] = max(self.usages.get(name, 0), now)

    def report(self) -> dict[str, int]:
        """Bytes at the peak, how often the limit was met, and how many processes were killed."""
        events = table(self.directory / "memory.events")
        killed = table(self.directory / "memory.oom_control").get("oom_kill", 0)
        return {
            "peak_bytes": number(self.directory / self.peak),
            **{f"peak_{name}_bytes": value for name, value in self.usages.items()},
            "limit_hits": events.get("max", max(number(self.directory / f) for f in _FAILURES)),
            "oom_kills": events.get("oom_kill", killed),
        }


def table(path: Path) -> dict[str, int]:
    """A file of `name number` lines; empty where there is none."""
    with contextlib.suppress(OSError, ValueError):
        lines = (line.split() for line in path.read_text().splitlines())
        return {name: int(value) for name, value in lines}
    return {}


def number(path: Path) -> int:
    """A file of one number; -1 where there is none."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return -1


def size_in_bytes(text: str) -> int:
    """`384MiB`, `1GB` or a number of bytes."""
    found = re.fullmatch(r"(\d+)([A-Za-z]*)", text)
    if found is None or found[2].upper() not in _UNITS or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 384MiB")
    return int(found[1]) * _UNITS[found[2].upper()]


@contextmanager
def memory_group(limit_bytes: int, cgroups: Path = CGROUPS) -> Iterator[Group]:
    """A group with that limit and no swap, removed when its processes have ended.

    Args:
        limit_bytes: of private memory, page cache and the kernel's own together.
        cgroups: where control groups are mounted.

    Yields:
        The group, still empty.

    Raises:
        Unavailable: no memory controller, or no right to use it.
    """
    if (cgroups / "memory" / "memory.limit_in_bytes").exists():
        root, limit, peak = cgroups / "memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes"
    elif "memory" in _words(cgroups / "cgroup.controllers"):
        root, limit, peak = cgroups, "memory.max", "memory.peak"
    else:
        raise Unavailable(
            f"{cgroups} has no memory controller (no memory/memory.limit_in_bytes, and no 'memory' "
            "in cgroup.controllers)"
        )
    directory = root / f"lowtide-{os.getpid()}"
    try:
        if root == cgroups and "memory" not in _words(root / "cgroup.subtree_control"):
            (root / "cgroup.subtree_control").write_text("+memory")
        directory.mkdir()
    except OSError as error:
        who = "" if os.geteuid() == 0 else "; you are not root"
        raise Unavailable(f"no group can be made in {root}: {error.strerror}{who}") from error
    try:
        _set(directory / limit, limit_bytes)
        for name, value in (
            ("memory.memsw.limit_in_bytes", limit_bytes),
            ("memory.swappiness", 0),
            ("memory.swap.max", 0),
        ):
            if (directory / name).exists():
                _set(directory / name, value)
        yield Group(directory, peak)
    finally:
        _remove(directory)


def _words(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text().split()
    return []


def _set(path: Path, value: int) -> None:
    try:
        path.write_text(str(value))
    except OSError as error:
        raise Unavailable(f"{path} cannot be set to {value:,}: {error.strerror}") from error


def _remove(directory: Path) -> None:
    """The kernel refuses for a moment after the last process has ended."""
    stop = time.monotonic() + _PATIENCE_S
    while directory.exists() and time.monotonic() < stop:
        with contextlib.suppress(OSError):
            directory.rmdir()
        time.sleep(0.02)


def drop_cached(paths: Iterable[Path]) -> int:
    """Drop the files' pages from the page cache.

    Args:
        paths: of files; what cannot be opened is left out.

    Returns:
        Bytes that stay cached, because another process has them mapped.
    """
    left = 0
    for path in paths:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            left += _cached(file.fileno())
    return left


def _cached(descriptor: int) -> int:
    """Bytes of a file that are in the page cache, by mincore(2)."""
    size = os.fstat(descriptor).st_size
    if size == 0:
        return 0
    libc = ctypes.CDLL(None)
    # Writable only so that ctypes gives its address; private, and never written.
    with mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        libc.mincore(ctypes.byref(first), ctypes.c_size_t(size), pages)
        del first
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def libraries(python: str) -> list[Path]:
    """Shared objects of that Python's packages, torch's among them."""
    code = "import sysconfig; print(sysconfig.get_path('platlib'))"
    root = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return [p for p in Path(root.stdout.strip()).rglob("*.so*") if p.is_file()]


def weights(flags: Sequence[str]) -> list[Path]:
    """The weight files of the `--model` among the flags: a directory, or a shape's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", default="")
    parser.add_argument("--cache-dir", default=str(SHAPES))
    given, _ = parser.parse_known_args(flags)
    places = (Path(given.model).expanduser(), Path(given.cache_dir).expanduser() / given.model)
    return [path for place in places for path in place.glob("*.safetensors")]


def run_step(python: str, flags: Sequence[str], group: Group | None) -> dict[str, Any]:
    """`lowtide bench step` in a fresh process, from its first instruction in the group.

    Args:
        python: the interpreter that has lowtide.
        flags: of the command.
        group: None for no limit.

    Returns:
        The command's document, or `error` with what became of it.
    """
    command = [python, "-P", "-m", "lowtide.cli.main", "bench", "step", *flags, "--json"]
    if group is not None:
        join = 'echo $$ >"$0" && exec "$@"'
        command = ["sh", "-c", join, str(group.directory / "cgroup.procs"), *command]
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out)
        try:
            while process.poll() is None:
                if group is not None:
                    group.look()
                time.sleep(_POLL_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        out.seek(0)
        said = out.read()
    if process.returncode < 0:
        return {"error": f"killed by signal {-process.returncode}"}
    try:
        document: dict[str, Any] = json.loads(said)
    except ValueError:
        return {"error": f"exit code {process.returncode}"}
    return document


def same_result(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether all losses and the final adapter are equal, bit for bit."""

    def bits(document: dict[str, Any]) -> list[Any]:
        steps = [document["warmup_step"], *document["steps"]]
        return [document["adapter_sha256"], *(step["loss"].hex() for step in steps)]

    return bits(one) == bits(other)


def compare(limit_bytes: int, python: str, flags: Sequence[str]) -> dict[str, Any]:
    """Both runs.

    Args:
        limit_bytes: of the group.
        python: the interpreter that has lowtide.
        flags: of `bench step`.

    Returns:
        `limit_bytes`, `group` (see `Group.report`), `still_cached_bytes`, `limited` and `unlimited`
        (documents of `bench step`), and where both ended well `equal`, `time_ratio` and
        `cpu_ratio`.

    Raises:
        Unavailable: no control group can be had.
    """
    with memory_group(limit_bytes) as group:
        left = drop_cached([*weights(flags), *libraries(python)])
        limited = run_step(python, flags, group)
        result: dict[str, Any] = {
            "limit_bytes": limit_bytes,
            "still_cached_bytes": left,
            "group": group.report(),
            "limited": limited,
        }
    unlimited = result["unlimited"] = run_step(python, flags, None)
    if "error" not in limited and "error" not in unlimited:
        result["equal"] = same_result(limited, unlimited)
        result["time_ratio"] = limited["wall_s"] / unlimited["wall_s"]
        # Of a step shorter than a tick of the clock there is nothing to say.
        whole = unlimited["cpu_s"]
        result["cpu_ratio"] = limited["cpu_s"] / whole if whole else None
    return result


def text(result: dict[str, Any]) -> str:
    """The result for people, in MB = 10^6 bytes."""
    group, lines = result["group"], []
    peaks = ", ".join(
        f"{name} {group.get(f'peak_{name}_bytes', 0) / 1e6:,.0f}"
        for name in ("anon", "cache", "mapped")
    )
    lines.append(
        f"limit {result['limit_bytes'] / 1e6:,.1f} MB   highest usage "
        f"{group['peak_bytes'] / 1e6:,.1f} MB (highest each: {peaks} MB)   limit met "
        f"{group['limit_hits']:,} times   killed {group['oom_kills']}"
    )
    if result["still_cached_bytes"]:
        lines.append(
            f"{result['still_cached_bytes'] / 1e6:,.1f} MB of weights and libraries are mapped by "
            "other processes and were not charged to the group"
        )
    for name in ("limited", "unlimited"):
        one = result[name]
        if "error" in one:
            lines.append(f"{name:<10} {one['error']}")
            continue
        losses = " ".join(f"{step['loss']:.9f}" for step in [one["warmup_step"], *one["steps"]])
        lines.append(
            f"{name:<10} {one['wall_s']:.2f} s/step  {one['cpu_s']:.2f} CPU s  read "
            f"{one['disk_read_bytes'] / 1e6:,.0f} MB/step  peak_anon "
            f"{one['peak_anon_bytes'] / 1e6:.1f} MB  peak_file {one['peak_file_bytes'] / 1e6:.1f} "
            f"MB  losses {losses}"
        )
    if "equal" in result:
        equal = "equal bit for bit" if result["equal"] else "DIFFERENT"
        cpu = result["cpu_ratio"]
        lines.append(
            f"losses and adapter: {equal}   time ratio {result['time_ratio']:.2f} wall"
            + ("" if cpu is None else f", {cpu:.2f} CPU")
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run both, print, and say by the exit code how it went."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        usage="limited.py --memory-limit SIZE [--json] -- FLAGS OF `lowtide bench step`",
    )
    parser.add_argument("--memory-limit", type=size_in_bytes, required=True, metavar="SIZE")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has lowtide")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("flags", nargs="*", help="flags of `lowtide bench step`, after --")
    given = parser.parse_args(argv)
    try:
        result = compare(given.memory_limit, given.python, given.flags)
    except Unavailable as error:
        print(f"limited.py: no memory control group can be had: {error}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps(result) if given.json else text(result))
    return 0 if result.get("equal") and result["group"]["oom_kills"] == 0 else 1


if __name__ == "__main__":
    # Ended like by Ctrl-C: the run is ended too, and the group removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
