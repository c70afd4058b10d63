"""Heat, battery and energy as Linux tells them, in made-up directories; niceness in a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lowtide.device import EnergyMeter, Paced, on_battery, temperature_c


def put(directory: Path, **files: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_text(f"{content}\n")


def test_the_hottest_sensor_of_the_processor_counts(tmp_path: Path) -> None:
    assert temperature_c(tmp_path) is None
    put(tmp_path / "hwmon" / "hwmon3", name="nvme", temp1_input=81_900)
    assert temperature_c(tmp_path) == 81.9
    put(tmp_path / "thermal" / "thermal_zone0", type="acpitz", temp=27_800)
    put(tmp_path / "thermal" / "thermal_zone1", type="x86_pkg_temp", temp=64_000)
    put(tmp_path / "hwmon" / "hwmon0", name="coretemp", temp1_input=63_000, temp2_input=71_500)
    assert temperature_c(tmp_path) == 71.5


@pytest.mark.parametrize("broken", ["", "hot", "nan", "-274000", "999999000"])
def test_a_sensor_that_makes_no_sense_is_left_out(tmp_path: Path, broken: str) -> None:
    put(tmp_path / "thermal" / "thermal_zone0", type="cpu-thermal", temp=broken)
    assert temperature_c(tmp_path) is None
    put(tmp_path / "thermal" / "thermal_zone1", type="soc-thermal", temp=40_000)
    assert temperature_c(tmp_path) == 40


@pytest.mark.parametrize(
    ("supplies", "expected"),
    [
        ({}, None),
        ({"AC": {"type": "Mains", "online": 1}}, None),
        ({"mouse": {"type": "Battery", "scope": "Device", "status": "Discharging"}}, None),
        ({"BAT0": {"type": "Battery", "status": "Discharging"}}, True),
        ({"BAT0": {"type": "Battery", "status": "Charging"}}, False),
        # The plug decides: some batteries give a little while plugged in.
        (
            {
                "BAT0": {"type": "Battery", "status": "Discharging"},
                "AC": {"type": "Mains", "online": 1},
            },
            False,
        ),
        (
            {
                "BAT0": {"type": "Battery", "status": "Not charging"},
                "AC": {"type": "Mains", "online": 0},
                "usb": {"type": "USB", "online": 0},
            },
            True,
        ),
        (
            {
                "BAT0": {"type": "Battery", "status": "Full"},
                "AC": {"type": "Mains", "online": 0},
                "usb": {"type": "USB", "online": 1},
            },
            False,
        ),
    ],
)
def test_battery_or_plug(
    tmp_path: Path, supplies: dict[str, dict[str, object]], expected: bool | None
) -> None:
    for name, files in supplies.items():
        put(tmp_path / "power_supply" / name, **files)
    assert on_battery(tmp_path) is expected


def test_energy_is_summed_over_packages_and_turns_of_the_counter(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path).joules() is None
    zone = tmp_path / "powercap" / "intel-rapl:0"
    put(zone, energy_uj=900_000_000, max_energy_range_uj=1_000_000_000)
    put(tmp_path / "powercap" / "intel-rapl:1", energy_uj=5, max_energy_range_uj=1_000_000_000)
    # Part of the first package; not to be counted twice.
    put(tmp_path / "powercap" / "intel-rapl:0:0", energy_uj=7, max_energy_range_uj=10)
    meter = EnergyMeter(tmp_path)
    assert meter.joules() == 0
    put(zone, energy_uj=950_000_000)
    assert meter.joules() == 50
    put(zone, energy_uj=20_000_000)
    put(tmp_path / "powercap" / "intel-rapl:1", energy_uj=2_000_005)
    assert meter.joules() == 50 + 70 + 2


def test_a_paced_reading_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [100.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    paced = Paced(lambda: asked.append(now[0]) or len(asked), 5.0)
    readings = []
    for now[0] in (100, 101, 104.9, 105, 109, 120):
        readings.append(paced())
    assert readings == [1, 1, 1, 2, 2, 3]


def test_niceness_reaches_threads_that_run_already() -> None:
    code = (
        "import os, threading, time\n"
        "from lowtide.device import lower_priority\n"
        "ready = threading.Event()\n"
        "threading.Thread(target=ready.wait, daemon=True).start()\n"
        "start = os.nice(0)\n"
        "lower_priority(min(19, start + 3)); lower_priority(0)\n"
        "print(start, [os.getpriority(os.PRIO_PROCESS, int(t))\n"
        "              for t in os.listdir('/proc/self/task')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    start, found = done.stdout.split(maxsplit=1)
    niceness = eval(found)
    assert len(niceness) >= 2
    assert set(niceness) == {min(19, int(start) + 3)}
