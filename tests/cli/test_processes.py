"""The installed program as a process: signals, pipes, full disks."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shlex
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import small

import lowtide as lt
from lowtide.cli.main import main


def start(*arguments: object) -> subprocess.Popen[str]:
    """A process in a group of its own, as a shell starts one."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        small.command(*arguments), stdout=pipe, stderr=pipe, text=True,
        env=small.environment(), start_new_session=True,
    )  # fmt: skip


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run a command line of bash; its exit code is that of the first command of a pipe."""
    return subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, timeout=120, check=False, env=small.environment(),
    )  # fmt: skip


def quoted(*arguments: object) -> str:
    return shlex.join(small.command(*arguments))


def read_until(process: subprocess.Popen[str], start: str) -> None:
    """Read lines of stdout until one that starts so."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return
    pytest.fail(f"no line starts with {start!r}; stderr: {process.communicate()[1]}")


def test_ctrl_c_while_training_saves_the_adapter(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(
        "train", "--model", model, "--data", data, "--adapter-path", out, "--iters", 10**7,
        "--max-seq-length", 32, "--steps-per-report", 10**7, "--save-every", 10**7,
    )  # fmt: skip
    read_until(process, "step 1/")
    os.killpg(process.pid, signal.SIGINT)
    text, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""
    assert "interrupted after" in text
    assert "Traceback" not in text
    assert set(os.listdir(out)) == {
        "adapter_model.safetensors", "adapter_config.json", "run.yaml", "metrics.jsonl",
        "events.jsonl", "checkpoints",
    }  # fmt: skip
    loaded = lt.Adapter.load(out, lt.load_model(model))
    assert any(bool(p.any()) for name, p in loaded.items() if ".lora_B." in name)
    steps = len((out / "metrics.jsonl").read_text().splitlines())
    assert f"interrupted after {steps} updates" in text


def test_ctrl_c_while_tokenising_leaves_nothing(model: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "a" / "b"
    line = b'{"text": "' + b"once upon a time " * 60 + b'"}\n'
    data.write_bytes(line * 200_000)  # 200 MB, some ten seconds of tokenising
    process = start(
        "train", "--model", model, "--data", data, "--adapter-path", out, "--max-seq-length", 32
    )
    read_until(process, "adapter  ")
    deadline = time.monotonic() + 30
    while not out.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # the tokenising process has started, or is about to
    os.killpg(process.pid, signal.SIGINT)
    text, err = process.communicate(timeout=60)
    assert process.returncode == 130, (text, err)
    assert err == "lowtide: interrupted.\n"
    assert set(small.tree(tmp_path)) == {"data.jsonl"}


def test_a_limit_on_file_size_leaves_the_old_adapter(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    base = ("train", "--model", model, "--data", data, "--adapter-path", out, "--iters", 2)
    assert small.run(*base, "--max-seq-length", 32).code == 0
    before = small.tree(out)
    done = small.run_process(
        *base, "--max-seq-length", 32, "--overwrite", "--lora-r", 64,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    assert done.code == 1, done
    assert done.err.startswith("lowtide: training stopped at step 1: ")
    assert "File too large" in done.err
    assert f"Nothing was written to {out}" in done.err
    assert "Traceback" not in done.err
    assert small.tree(out) == before


def test_a_closed_pipe_does_not_end_a_training_run(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = quoted(
        "train", "--model", model, "--data", data, "--adapter-path", out, "--iters", 30,
        "--max-seq-length", 32, "--steps-per-report", 1,
    )  # fmt: skip
    done = shell(f"{line} | head -1")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert done.returncode == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 30


def test_a_closed_pipe_ends_what_only_prints(model: Path) -> None:
    generate = quoted("generate", "--model", model, "--max-tokens", 60, "--temperature", 3)
    lines = (f"{generate} | true", f"{quoted('train', '--help')} | head -1")
    with ThreadPoolExecutor() as pool:
        for done in pool.map(shell, lines):
            assert done.stderr == ""
            assert done.returncode in (0, 1)  # 0 where all went into the pipe before it closed


def test_output_to_a_full_device_is_an_error(model: Path) -> None:
    done = shell(f"{quoted('info', model)} > /dev/full")
    assert done.returncode == 1
    assert done.stderr == "lowtide: the output cannot be written: No space left on device.\n"


def test_text_that_the_terminal_cannot_show_is_escaped(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "модель"
    os.symlink(model, other)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(terminal):
        assert main(["info", str(other)]) == 0
    terminal.seek(0)
    assert "\\u043c\\u043e" in terminal.read()


def test_ctrl_c_while_torch_is_being_imported(model: Path) -> None:
    process = start("info", "--model", model)
    mapped = Path(f"/proc/{process.pid}/maps")
    while "libtorch_cpu" not in mapped.read_text():  # its loading alone takes half a second
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "lowtide: interrupted.\n"
