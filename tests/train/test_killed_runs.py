"""Runs in processes of their own, killed, ended, locked out: what is left goes on to the byte."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import small
from runs import WEIGHTS, assert_tidy

from lowtide.train.checkpoints import Checkpoints
from lowtide.train.lock import LOCK_FILE, locked

SETTINGS = {
    "max_seq_length": 32, "batch_size": 5, "lora_dropout": 0.2, "grad_accumulation_steps": 2,
    "optimizer_state": "8bit", "adapter_dtype": "bfloat16", "save_every": 2, "steps_per_eval": 5,
    "valid_records": 4, "seed": 7, "steps_per_report": 1_000_000,
}  # fmt: skip


def flags(model: Path, data: Path, **given: object) -> list[object]:
    found: list[object] = ["--model", model, "--data", data]
    for name, value in {**SETTINGS, **given}.items():
        found += [f"--{name.replace('_', '-')}", value]
    return found


def start(out: Path, settings: list[object]) -> subprocess.Popen[str]:
    """The run's next sitting: resumed where there is something to resume."""
    more = ["--resume"] if (out / "checkpoints").is_dir() else settings
    return subprocess.Popen(
        small.command("train", "--adapter-path", out, *more),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=small.environment(),
    )  # fmt: skip


def metrics_size(out: Path) -> int:
    """Of the newest metrics.jsonl, hidden or in place."""
    sizes = [0]
    for path in (*out.glob(".run-*/metrics.jsonl"), *out.glob("metrics.jsonl")):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # it has just been moved in
            continue
    return sizes[-1]


def is_saving(out: Path) -> bool:
    return any(name.startswith(".step-") for name in _names(out / "checkpoints"))


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def kill_somewhere(process: subprocess.Popen[str], out: Path, chance: random.Random) -> None:
    """SIGKILL: while it starts, some updates later, or with a checkpoint half written."""
    moment = chance.choice(["start", "later", "save", "save"])
    if moment == "start":
        time.sleep(chance.uniform(0, 3))
    else:
        enough = metrics_size(out) + chance.randrange(1, 6000)  # a line has some 600 bytes
        while process.poll() is None and metrics_size(out) < enough:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        while moment == "save" and process.poll() is None and not is_saving(out):
            pass
    process.kill()
    process.communicate()


def killed_until(kills: int, out: Path, settings: list[object]) -> tuple[int, int]:
    """Kill and resume a run; how often it made a step in between, and died while saving."""
    chance = random.Random(kills)
    progressed = saving = 0
    reached = -1
    for _ in range(kills):
        kill_somewhere(start(out, settings), out, chance)
        saving += is_saving(out)
        found, damaged = Checkpoints(out).newest()
        assert damaged == []
        step = -1 if found is None else found.state.step
        assert step >= reached  # nothing that was saved is lost
        progressed += step > reached
        reached = step
    return progressed, saving


def finished(out: Path, settings: list[object]) -> str:
    process = start(out, settings)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    return text


def figures(out: Path) -> list[tuple[object, ...]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line.get(key) for key in ("step", "loss", "valid_loss")) for line in lines]


def assert_same_run(out: Path, truth: Path) -> None:
    for name in (WEIGHTS, "adapter_config.json", f"best/{WEIGHTS}"):
        assert (out / name).read_bytes() == (truth / name).read_bytes(), name
    assert figures(out) == figures(truth)
    assert_tidy(out, best=True)


@pytest.mark.parametrize(
    ("kills", "iters"), [(4, 40), pytest.param(50, 300, marks=pytest.mark.slow)]
)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    model: Path, data: Path, tmp_path: Path, kills: int, iters: int
) -> None:
    settings = flags(model, data, iters=iters)
    finished(tmp_path / "truth", settings)
    progressed, saving = killed_until(kills, tmp_path / "out", settings)
    print(f"{kills} kills, {saving} of them while saving; {progressed} sittings saved something")
    finished(tmp_path / "out", settings)
    assert_same_run(tmp_path / "out", tmp_path / "truth")
    assert progressed
    assert saving or kills < 50


@pytest.fixture
def endless(model: Path, data: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that is making updates."""
    process = start(tmp_path / "out", flags(model, data, iters=10**6, save_every=10**6))
    while metrics_size(tmp_path / "out") < 2000:
        assert process.poll() is None
        time.sleep(0.01)
    yield process
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_saves_and_ends(
    endless: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    endless.send_signal(number)
    text, _ = endless.communicate()
    assert endless.returncode == 130
    assert "interrupted after" in text
    assert "Traceback" not in text
    assert_tidy(tmp_path / "out", best=True)
    found, _ = Checkpoints(tmp_path / "out").newest()
    assert found is not None
    assert found.state.step == figures(tmp_path / "out")[-1][0]


def test_a_second_run_on_one_directory_is_told_who_is_there(
    endless: subprocess.Popen[str], model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for how in (["--resume"], [*flags(model, data), "--overwrite"]):
        outcome = small.run("train", "--adapter-path", out, *how)
        assert outcome.code == 2
        assert f"--adapter-path {out} is in use by another run: process {endless.pid} on " in (
            outcome.err
        )
        assert "Wait for it or end it, or choose another directory" in outcome.err
    assert endless.poll() is None
    endless.kill()
    endless.wait()
    assert (out / LOCK_FILE).exists()  # which stops nobody now
    with locked(out):
        pass
    assert not (out / LOCK_FILE).exists()


def test_an_output_directory_that_vanishes_is_told(
    endless: subprocess.Popen[str], tmp_path: Path
) -> None:
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    text, _ = endless.communicate()
    assert endless.returncode == 1
    assert f"{tmp_path / 'out'} cannot be written: No such file or directory" in text
    assert "The directory or its disk is gone; see that it is there" in text
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()
    found, damaged = Checkpoints(tmp_path / "elsewhere").newest()
    assert found is not None
    assert damaged == []


@pytest.mark.slow
def test_a_real_disk_that_is_full_at_random_moments_loses_nothing(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """On a file system of 3 MB, of which something else takes the rest now and then."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        settings = flags(model, data, iters=120)
        finished(tmp_path / "truth", settings)
        chance = random.Random(1)
        failures, reached = 0, -1
        while failures < 8:
            process = start(disk / "out", settings)
            enough = metrics_size(disk / "out") + chance.randrange(1, 10_000)
            while process.poll() is None and metrics_size(disk / "out") < enough:
                time.sleep(0.001)
            _fill(disk / "filler")
            text, _ = process.communicate()
            if process.returncode == 0:
                break
            assert process.returncode == 1, text
            assert "No space left on device" in text
            (disk / "filler").unlink()
            failures += 1
            found, damaged = Checkpoints(disk / "out").newest()
            assert damaged == []
            assert (-1 if found is None else found.state.step) >= reached
            reached = -1 if found is None else found.state.step
        assert failures
        print(f"{failures} times full; the last checkpoint then was of step {reached}")
        (disk / "filler").unlink(missing_ok=True)
        finished(disk / "out", settings)
        assert_same_run(disk / "out", tmp_path / "truth")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _fill(path: Path) -> None:
    try:
        with open(path, "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 512)
    except OSError:
        pass
