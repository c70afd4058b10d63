"""The child process itself: how it ends, what it prints, what it may not import."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowtide.data import prepare as prepare_module
from lowtide.data.prepare import PrepareRequest, prepare
from lowtide.errors import LowtideError

CHILD = Path(prepare_module.__file__).with_name("child.py")


def test_a_child_that_dies(
    request_for: Callable[..., PrepareRequest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_rows: Callable[..., Path],
) -> None:
    path = write_rows(tmp_path / "d.jsonl", {"text": "a"})
    real = subprocess.Popen

    def child(code: str) -> None:
        def start(command: list[str], **settings: Any) -> Any:
            return real([sys.executable, "-c", code], **settings)

        monkeypatch.setattr(prepare_module.subprocess, "Popen", start)

    child("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(LowtideError, match=r"signal 9, .*out of memory.* It said nothing"):
        prepare(request_for(path))
    child("print('noise'); raise RuntimeError('a bug')")
    with pytest.raises(LowtideError, match=r"ended with code 1. Its last words:") as caught:
        prepare(request_for(path))
    assert str(caught.value).endswith("RuntimeError: a bug")
    assert type(caught.value) is LowtideError
    child("print('{}')")
    with pytest.raises(LowtideError, match="ended with code 0"):
        prepare(request_for(path))


def test_ctrl_c_that_the_child_gets_first(
    request_for: Callable[..., PrepareRequest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_rows: Callable[..., Path],
) -> None:
    path = write_rows(tmp_path / "d.jsonl", {"text": "a"})
    real = subprocess.Popen
    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    monkeypatch.setattr(
        prepare_module.subprocess,
        "Popen",
        lambda command, **settings: real([sys.executable, "-c", code], **settings),
    )
    with pytest.raises(KeyboardInterrupt):
        prepare(request_for(path))


def test_what_a_library_prints_is_not_the_answer(
    bare_room: str,
    request_for: Callable[..., PrepareRequest],
    tmp_path: Path,
    write_rows: Callable[..., Path],
) -> None:
    code = (
        f"{bare_room}from lowtide.data import child, worker; real = worker.run\n"
        "worker.run = lambda request: print('noise') or real(request)\n"
        "import sys; sys.argv = ['child.py', 'worker']; child.main()"
    )
    path = write_rows(tmp_path / "d.jsonl", {"text": "a"})
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=request_for(path).to_json(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["splits"]["train"]["records"] == 1
    assert "noise" in done.stderr


def test_a_working_directory_full_of_traps(
    request_for: Callable[..., PrepareRequest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_rows: Callable[..., Path],
) -> None:
    """A random.py or tokenizers.py of the user's own must not be imported."""
    for name in ("random", "tokenizers", "tempfile"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('trapped')")
    path = write_rows(tmp_path / "d.jsonl", {"text": "a"})
    monkeypatch.chdir(tmp_path)
    assert prepare(request_for(path)).splits["train"].records == 1


@pytest.mark.parametrize(("worker", "key"), [("worker", b"features"), ("prompts", b"tokenizer")])
def test_the_child_does_without_torch(worker: str, key: bytes) -> None:
    """torch would be most of its start-up time and memory."""
    code = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        f"sys.argv = ['child.py', {worker!r}]; runpy.run_path({str(CHILD)!r})['main']()"
    )
    done = subprocess.run([sys.executable, "-c", code], input=b"{}", capture_output=True)
    assert b"KeyError: '%s'" % key in done.stderr  # it got as far as reading the request
    assert b"halted" not in done.stderr


INTERRUPTED = """
import sys, subprocess
from lowtide.data import prepare as module
real = subprocess.Popen
def start(*args, **settings):
    child = real(*args, **settings)
    print(child.pid, flush=True)
    return child
module.subprocess.Popen = start
try:
    module.prepare(module.PrepareRequest.from_json(sys.argv[1]))
except KeyboardInterrupt:
    sys.exit(130)
print("finished")
"""


def test_ctrl_c_ends_both_without_a_traceback(
    bare_room: str,
    request_for: Callable[..., PrepareRequest],
    tmp_path: Path,
    write_rows: Callable[..., Path],
) -> None:
    template = tmp_path / "template.jinja"
    os.mkfifo(template)  # the child waits for a line that never comes
    data = write_rows(tmp_path / "d.jsonl", {"text": "a"})
    request = request_for(data, chat_template=str(template))
    parent = subprocess.Popen(
        [sys.executable, "-c", bare_room + INTERRUPTED, request.to_json()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        writer = _open_when_read(template)
        (unfinished,) = (tmp_path / "cache").glob(".building-*")
        os.killpg(parent.pid, signal.SIGINT)
        out, err = parent.communicate(timeout=10)
        os.close(writer)
    finally:
        parent.kill()
    assert (parent.returncode, out, err) == (130, "", "")
    assert not unfinished.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def _open_when_read(path: Path) -> int:
    """Open a pipe to write to as soon as the child reads from it, well on its way."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            assert time.monotonic() < deadline, "the child never read its data"
            time.sleep(0.02)
