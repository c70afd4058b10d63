"""Signals that come before the first update: while the model is loaded, or the data tokenised."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import small
from runs import WEIGHTS, train
from test_manners import events, send, sleep_then

from lowtide.data.prepare import PrepareReport
from lowtide.model.adapter import Adapter
from lowtide.model.decoder import Decoder
from lowtide.train.observers import Quiet


class Early(Quiet):
    """Sends signals at a place, and keeps what it is told of pauses."""

    def __init__(self, place: str, *numbers: int) -> None:
        self.place, self.numbers = place, numbers
        self.told: list[str | None] = []

    def at(self, place: str) -> None:
        if place == self.place:
            for number in self.numbers:
                os.kill(os.getpid(), number)

    def on_model(self, model: Decoder, adapter: Adapter) -> None:
        self.at("model")

    def on_data(self, report: PrepareReport) -> None:
        self.at("data")

    def on_start(self, iters: int, budget_bytes: int | None) -> None:
        self.at("start")

    def on_pause(self, reason: str | None) -> None:
        self.told.append(reason)


@pytest.mark.parametrize("place", ["model", "data", "start"])
def test_a_pause_that_is_asked_for_early_comes_before_the_first_update(
    place: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(model, data, tmp_path / "straight")
    out = tmp_path / "out"
    sleep_then(monkeypatch, send(signal.SIGUSR2))
    early = Early(place, signal.SIGUSR1)
    train(model, data, out, early)
    assert early.told == ["asked to by SIGUSR1; SIGUSR2 goes on", None]
    kinds = [(e["event"], e["step"]) for e in events(out)]
    assert kinds == [("start", 0), ("paused", 0), ("went on", 0), ("end", 4)]
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "straight" / WEIGHTS).read_bytes()
    early = Early(place, signal.SIGUSR1, signal.SIGUSR2)  # thought better of it
    train(model, data, tmp_path / "other", early)
    assert early.told == []
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_early_pause_is_ended_with_nothing_left(
    number: int, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep_then(monkeypatch, send(number))
    with pytest.raises(KeyboardInterrupt):
        train(model, data, tmp_path / "deep" / "out", Early("model", signal.SIGUSR1))
    assert not (tmp_path / "deep").exists()


@contextmanager
def tokenising(model: Path, data: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of `lowtide train` whose child waits for a template that never comes."""
    template = out.parent / "template.jinja"
    os.mkfifo(template)
    process = subprocess.Popen(
        small.command(
            "train", "--model", model, "--data", data, "--adapter-path", out, "--chat-template",
            template, "--cache-dir", out.parent / "cache", "--max-seq-length", 32, "--json",
        ),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=small.environment(),
    )  # fmt: skip

    def read_from() -> int | None:
        try:
            return os.open(template, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads yet
            return None

    try:
        writer = until(read_from, process)
        yield process
        os.close(writer)
    finally:
        process.kill()


def until(happened: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    while (found := happened()) is None:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return found


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    return small.write_jsonl(tmp_path / "chats.jsonl", [chat])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_is_ended_while_it_tokenises_leaves_nothing(
    number: int, model: Path, chats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs" / "out"
    out.parent.mkdir()
    with tokenising(model, chats, out) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        (child,) = map(int, children.read_text().split())
        for pause in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1):
            process.send_signal(pause)  # ends nothing
        process.send_signal(number)
        text, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "interrupted" in err
    assert '"kind": "Interrupted"' in text
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not out.exists()
    assert list((out.parent / "cache").iterdir()) == []
