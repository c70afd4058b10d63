"""The meter sees a spike of 50 MB that lasts 5 ms, each time, whatever keeps its thread waiting."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lowtide.memory import measure
from lowtide.memory.measure import MemoryMeter, read_memory

SPIKE = 50_000_000
REPEATS = 20

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="memory is read from /proc"
)


def _busy(seconds: float) -> None:
    """Pure Python that never lets go of the interpreter's lock by itself."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _spike(wait: Callable[[float], None]) -> int:
    """Touch 50 MB for 5 ms; returns how far the memory rose, as read while it is there."""
    before = read_memory().anon_bytes
    pages = torch.ones(SPIKE, dtype=torch.uint8)
    after = read_memory().anon_bytes
    wait(0.005)
    del pages
    return after - before


@contextmanager
def _neighbours(count: int) -> Iterator[None]:
    command = [sys.executable, "-S", "-c", "print(flush=True)\nwhile True: pass"]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()
        yield
    finally:
        for other in others:
            other.kill()
            other.communicate()


@pytest.mark.parametrize("neighbours", [0, 2])
@pytest.mark.parametrize("wait", [time.sleep, _busy], ids=["sleeping", "holding the lock"])
def test_a_spike_of_5_ms_is_seen_each_time(wait: Callable[[float], None], neighbours: int) -> None:
    errors = []
    with _neighbours(neighbours), MemoryMeter() as meter:
        for _ in range(REPEATS):
            meter.take()
            rest = read_memory().anon_bytes - measure.AT_IMPORT.anon_bytes
            wait(0.002)
            rise = _spike(wait)
            wait(0.002)
            assert abs(rise - SPIKE) < 1_000_000
            errors.append(meter.take().anon_bytes - max(rest, 0) - SPIKE)
    assert max(map(abs, errors)) <= 2_000_000, errors


def test_a_spike_between_two_polls_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's mark alone finds it: the thread never polls here."""
    monkeypatch.setattr(measure, "POLL_S", 3600.0)
    with MemoryMeter() as meter:
        rest = meter.take()
        _spike(lambda seconds: None)
        peak = meter.take()
        calm = meter.take()
    assert abs(peak.anon_bytes - rest.anon_bytes - SPIKE) <= 2_000_000
    assert abs(peak.rss_bytes - rest.rss_bytes - SPIKE) <= 2_000_000
    assert calm.anon_bytes <= rest.anon_bytes + 2_000_000


def test_polling_alone_sees_it_where_the_mark_is_not_to_be_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "_STATUS", tmp_path / "absent")
    with MemoryMeter() as meter:
        rest = meter.take()
        _spike(lambda seconds: time.sleep(0.5))
        peak = meter.take()
    assert abs(peak.anon_bytes - rest.anon_bytes - SPIKE) <= 2_000_000


def test_a_mark_that_cannot_be_set_back_tells_of_higher_spikes_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status = tmp_path / "status"
    monkeypatch.setattr(measure, "_STATUS", status)
    monkeypatch.setattr(measure, "_CLEAR", tmp_path)  # a directory cannot be written to
    mark = measure._HighMark()
    taken = []
    for kilobytes in (100, 100, 250, 250):
        status.write_text(f"VmPeak:\t     999 kB\nVmHWM:\t     {kilobytes} kB\n")
        taken.append(mark.take())
    assert taken == [102_400, 0, 256_000, 0]


def test_newly_read_mapped_pages_are_not_anonymous(tmp_path: Path) -> None:
    """They rise in the kernel's mark; they must not rise in the figure."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(SPIKE))
    with MemoryMeter() as meter:
        rest = meter.take()
        mapped = torch.from_file(str(path), size=SPIKE // 4)
        assert float(mapped.max()) == 0
        read = meter.take()
        del mapped
        gone = meter.take()
    assert read.rss_bytes - rest.rss_bytes >= SPIKE - 2_000_000
    assert read.anon_bytes - rest.anon_bytes <= 2_000_000
    assert gone.anon_bytes - rest.anon_bytes <= 2_000_000


def test_the_switch_interval_is_short_while_it_runs_and_then_as_before() -> None:
    before = sys.getswitchinterval()
    with MemoryMeter():
        assert sys.getswitchinterval() <= 0.001
    assert sys.getswitchinterval() == before
    with pytest.raises(KeyError), MemoryMeter():
        raise KeyError
    assert sys.getswitchinterval() == before
