"""What the device tells of itself: heat, battery, energy; and how politely we run on it.

Standard library only. Linux's files under /sys; where they are absent the answer is None.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

SYS = Path("/sys/class")
PLAUSIBLE_C = (-40.0, 150.0)
_PROCESSORS = ("cpu", "core", "soc", "pkg", "k10temp", "zenpower", "tctl")

T = TypeVar("T")


class Paced(Generic[T]):
    """A reading that is taken again at most every so many seconds; in between it is remembered."""

    def __init__(self, read: Callable[[], T], every_s: float) -> None:
        """Nothing is read yet.

        Args:
            read: takes the reading.
            every_s: seconds, by the monotonic clock.
        """
        self._read, self._every_s = read, every_s
        self._due = -float("inf")
        self._last: T

    def __call__(self) -> T:
        """The reading, at most `every_s` old."""
        now = time.monotonic()
        if now >= self._due:
            self._last, self._due = self._read(), now + self._every_s
        return self._last


def temperature_c(system: Path = SYS) -> float | None:
    """The hottest sensor of the processor, or of the device where none is called so.

    Args:
        system: the directory with `thermal` and `hwmon`.

    Returns:
        Degrees Celsius, or None where the system does not tell.
    """
    named: list[tuple[str, float]] = []
    for zone in (system / "thermal").glob("thermal_zone*"):
        named += _sensor(zone / "type", [zone / "temp"])
    for chip in (system / "hwmon").glob("hwmon*"):
        named += _sensor(chip / "name", sorted(chip.glob("temp*_input")))
    processor = [celsius for name, celsius in named if any(p in name for p in _PROCESSORS)]
    return max(processor or [celsius for _, celsius in named], default=None)


def _sensor(name_file: Path, files: list[Path]) -> list[tuple[str, float]]:
    name = (_read(name_file) or "").lower()
    found = [number / 1000 for file in files if (number := _number(file)) is not None]
    return [(name, celsius) for celsius in found if PLAUSIBLE_C[0] < celsius < PLAUSIBLE_C[1]]


def on_battery(system: Path = SYS) -> bool | None:
    """Whether the device runs from its battery.

    Args:
        system: the directory with `power_supply`.

    Returns:
        None where there is no battery. Batteries of mice and the like do not count. Where an
        adapter tells whether it is plugged in, that decides; else whether a battery discharges.
    """
    batteries, plugs = [], []
    for supply in (system / "power_supply").glob("*"):
        kind = _read(supply / "type")
        if kind == "Battery" and _read(supply / "scope") != "Device":
            batteries.append(_read(supply / "status") == "Discharging")
        elif kind in ("Mains", "USB") and (online := _number(supply / "online")) is not None:
            plugs.append(online > 0)
    if not batteries:
        return None
    return not any(plugs) if plugs else any(batteries)


class EnergyMeter:
    """Joules of the processor packages since it was made, where RAPL may be read.

    Each counter starts again at its own maximum, after half an hour under full load or later, so
    `joules` must be asked for more often than that.
    """

    def __init__(self, system: Path = SYS) -> None:
        """Read the counters for the first time.

        Args:
            system: the directory with `powercap`.
        """
        zones = (system / "powercap").glob("intel-rapl:*")
        packages = [zone for zone in zones if zone.name.count(":") == 1]
        self._last = {
            zone: now for zone in packages if (now := _number(zone / "energy_uj")) is not None
        }
        self._total = 0.0

    def joules(self) -> float | None:
        """Joules so far; None where the system does not tell, or not this user."""
        if not self._last:
            return None
        for zone, before in self._last.items():
            now = _number(zone / "energy_uj")
            if now is not None:
                turn = _number(zone / "max_energy_range_uj") or 0.0
                self._total += (now - before if now >= before else now - before + turn) / 1e6
                self._last[zone] = now
        return self._total


def lower_priority(niceness: int) -> None:
    """Give this process, with all its threads, at least that niceness (0 to 19, see nice(1)).

    A process that is nicer already stays so.

    Args:
        niceness: 19 runs only when nothing else wants the cores.
    """
    try:
        threads = [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        threads = [0]
    for thread in threads:
        with contextlib.suppress(OSError):  # a thread that has ended
            if os.getpriority(os.PRIO_PROCESS, thread) < niceness:
                os.setpriority(os.PRIO_PROCESS, thread, niceness)


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # some sensors exist and cannot be read
        return None


def _number(file: Path) -> float | None:
    try:
        return float(_read(file) or "")
    except ValueError:
        return None
