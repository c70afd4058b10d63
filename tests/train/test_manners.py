"""Pauses by signal, from the battery and in the heat; they change nothing but the clock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small
from runs import train

from lowtide.train import looking, manners
from lowtide.train.history import StepReport
from lowtide.train.looking import MannerSettings
from lowtide.train.loop import Trainer
from lowtide.train.manners import Manners
from lowtide.train.observers import Quiet

ANY: Any = SimpleNamespace(step=1)


def events(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


class Pauses(Quiet):
    """Asks for a pause after the second update, and keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str | None] = []

    def on_step(self, report: StepReport) -> None:
        if report.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_pause(self, reason: str | None) -> None:
        self.told.append(reason)


def sleep_then(monkeypatch: pytest.MonkeyPatch, *then: Callable[[], None]) -> list[float]:
    """Instead of sleeping, do one thing after another."""
    left, slept = list(then), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        left.pop(0)()

    monkeypatch.setattr(manners.time, "sleep", sleep)
    return slept


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def nothing() -> None:
    pass


def resting(told: list[Any]) -> Any:
    """A trainer that tells when it rests."""
    return SimpleNamespace(rest=told.append, stop=SimpleNamespace(requested=False, pausing=False))


@pytest.mark.parametrize("given", [{}, {"keep_blocks": 1, "recompute_h": False}])
def test_a_pause_by_signal_gives_memory_back_and_changes_nothing(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    train(model, data, tmp_path / "straight", **given)
    trainers: list[Trainer] = []
    real = Trainer.rest

    def rest(self: Trainer, resting: bool) -> None:
        real(self, resting)
        trainers.append(self)

    def held() -> None:
        method: Any = trainers[0].method
        kept = (method._buffers._ws, method._buffers._rows, method._kept, method._stored_h)
        assert kept == (None, None, None, None)

    monkeypatch.setattr(Trainer, "rest", rest)
    slept = sleep_then(monkeypatch, held, send(signal.SIGUSR2))
    observer = Pauses()
    result = train(model, data, tmp_path / "paused", observer=observer, **given)
    assert result.steps == 4
    assert len(slept) == 2
    assert observer.told == ["asked to by SIGUSR1; SIGUSR2 goes on", None]
    a, b = (
        (tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("straight", "paused")
    )
    assert a == b
    kinds = [(e["event"], e["step"]) for e in events(tmp_path / "paused")]
    assert kinds == [("start", 0), ("paused", 2), ("went on", 2), ("end", 4)]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_ctrl_c_during_a_pause_saves_what_was_made(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep_then(monkeypatch, nothing, send(signal.SIGINT))
    result = train(model, data, tmp_path / "out", observer=Pauses())
    assert (result.interrupted, result.steps) == (True, 2)
    train(model, data, tmp_path / "two", iters=2)
    a, b = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("out", "two"))
    assert a == b
    assert [e["event"] for e in events(tmp_path / "out")] == ["start", "paused", "went on", "end"]


def test_a_paused_process_rests(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        small.command(
            "train", "--model", model, "--data", data, "--adapter-path", out, "--iters", 10**7,
            "--max-seq-length", 32, "--steps-per-report", 10**7, "--save-every", 10**7,
        ),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=small.environment(),
    )  # fmt: skip

    def until(happened: Callable[[], bool]) -> None:
        while not happened():
            assert process.poll() is None
            time.sleep(0.02)

    def kinds() -> list[str]:
        return [e["event"] for e in events(out)] if (out / "events.jsonl").exists() else []

    def lines() -> int:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")

    def ticks() -> int:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    until(lambda: kinds() == ["start"])
    process.send_signal(signal.SIGUSR1)
    until(lambda: kinds() == ["start", "paused"])
    before, cpu = lines(), ticks()
    time.sleep(1)
    assert lines() == before
    assert ticks() - cpu <= 0.05 * os.sysconf("SC_CLK_TCK")  # of a second of one core
    assert small.run("runs", tmp_path, "--json").document["runs"][0]["state"] == "paused"
    process.send_signal(signal.SIGUSR2)
    until(lambda: lines() > before)
    process.send_signal(signal.SIGINT)
    text, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "paused after step" in text
    assert "going on" in text


def system_with(tmp_path: Path, celsius: float | None = None, online: int | None = None) -> Path:
    if celsius is not None:
        zone = tmp_path / "thermal" / "thermal_zone0"
        zone.mkdir(parents=True, exist_ok=True)
        (zone / "type").write_text("cpu-thermal\n")
        (zone / "temp").write_text(f"{celsius * 1000:.0f}\n")
    if online is not None:
        for name, files in (
            ("BAT0", {"type": "Battery", "status": "Unknown"}),
            ("AC", {"type": "Mains", "online": str(online)}),
        ):
            (tmp_path / "power_supply" / name).mkdir(parents=True, exist_ok=True)
            for file, content in files.items():
                (tmp_path / "power_supply" / name / file).write_text(content + "\n")
    return tmp_path


def test_heat_pauses_until_it_is_five_degrees_cooler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    system = system_with(tmp_path, celsius=80)
    polite = Manners(
        MannerSettings(max_temperature=80), told.append, resting(told), system, sensors_s=0
    )
    polite.on_step(ANY)
    assert told == []  # not hotter than the limit
    system_with(tmp_path, celsius=80.6)
    sleep_then(
        monkeypatch, *(lambda c=c: system_with(tmp_path, celsius=c) for c in (90, 76, 75.1, 75))
    )
    polite.on_step(ANY)
    assert told == ["the processor is at 81 °C; --max-temperature is 80", True, False, None]
    system_with(tmp_path, celsius=79)
    polite.on_step(ANY)
    assert len(told) == 4  # the usual limit again


def test_the_battery_pauses_until_the_plug_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    polite = Manners(
        MannerSettings(pause_on_battery=True), told.append, resting(told),
        system_with(tmp_path, online=1), sensors_s=0,
    )  # fmt: skip
    polite.on_step(ANY)
    assert told == []
    system_with(tmp_path, online=0)
    sleep_then(monkeypatch, nothing, lambda: system_with(tmp_path, online=1))  # type: ignore[arg-type, return-value]
    polite.on_step(ANY)
    assert told == ["the device runs from its battery", True, False, None]


def test_an_update_pays_for_no_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(manners, "on_battery", lambda system: asked.append("battery"))
    monkeypatch.setattr(manners, "temperature_c", lambda system: asked.append("heat"))
    polite = Manners(
        MannerSettings(pause_on_battery=True, max_temperature=80), lambda reason: None,
        resting([]),
    )  # fmt: skip
    for _ in range(1000):
        polite.on_step(ANY)
    assert asked == ["battery", "heat"]


def test_sensors_that_are_not_there_are_refused(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "on_battery", lambda system: None)
    monkeypatch.setattr(looking, "temperature_c", lambda system: None)
    base = ("train", "--model", model, "--data", data, "--adapter-path", tmp_path / "out")
    outcome = small.run(*base, "--pause-on-battery")
    assert outcome.code == 2
    assert "--pause-on-battery: /sys/class/power_supply tells of no battery" in outcome.err
    outcome = small.run(*base, "--max-temperature", 80)
    assert outcome.code == 2
    assert "nor /sys/class/hwmon tells a temperature here. Leave it out." in outcome.err
    for flags in (("--nice", 20), ("--nice", -1), ("--max-temperature", 0)):
        assert small.run(*base, *flags).code == 2
    assert not (tmp_path / "out").exists()


NICE = """
import os, sys
import lowtide as lt
model, data, out = sys.argv[1:]
lt.train(model=model, data=data, adapter_path=out, iters=2, max_seq_length=32, nice=19, threads=2)
threads = os.listdir("/proc/self/task")
print({os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in threads})
"""


def test_nice_reaches_all_threads(model: Path, data: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NICE, str(model), str(data), str(tmp_path / "out")],
        capture_output=True, text=True, check=False, env=small.environment(OMP_NUM_THREADS="2"),
    )  # fmt: skip
    assert done.stdout == "{19}\n", done.stderr
