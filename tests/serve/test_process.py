"""`lowtide serve` as a process: under load, at its end, and where it cannot start."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import small
from serving import all_of, ask, connected, request_bytes


class Process:
    """`lowtide serve` in a process of its own."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            small.command("serve", "--port", 0, "--json", *arguments),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=small.environment(),
        )  # fmt: skip
        assert self.process.stdout is not None
        self.document = json.loads(self.process.stdout.readline())
        self.port = int(self.document["url"].rpartition(":")[2])

    def state(self) -> tuple[int, int, int]:
        """RssAnon in bytes, threads, open files."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        anon, threads = (
            int(re.search(rf"{key}:\s+(\d+)", text)[1])  # type: ignore[index]
            for key in ("RssAnon", "Threads")
        )
        return anon * 1024, threads, len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=120)
        return self.process.returncode, err


@contextmanager
def processed(*arguments: object) -> Iterator[Process]:
    one = Process(*arguments)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()


def test_two_hundred_at_a_time_are_answered_or_refused_and_leave_nothing_behind(
    model: Path, adapter: Path
) -> None:
    with processed("--model", model, "--adapter-path", f"tuned={adapter}") as one:
        assert one.document["models"] == ["tiny", "tuned"]

        def storm(number: int) -> int:
            asked: dict[str, Any] = {"model": ("base", "tuned")[number % 2], "max_tokens": 40}
            asked |= {"messages": [{"role": "user", "content": f"hello {number}"}]}
            if number % 10 == 3:
                with connected(one.port) as gone:  # asks and hangs up
                    gone.sendall(request_bytes(one.port, **{**asked, "stream": True}))
                return 0
            if number % 10 == 5:
                return ask(one.port, "POST", "/v1/chat/completions", b"{nothing").status
            if number % 10 == 7:
                return ask(one.port, "POST", "/v1/completions", b"x" * (2 << 20)).status
            told = ask(one.port, "POST", "/v1/chat/completions", asked)
            if told.status != 200:
                assert told.document["error"]["message"]
                assert told.headers["retry-after"]
            return told.status

        def wave() -> Counter[int]:
            with ThreadPoolExecutor(200) as pool:
                return Counter(pool.map(storm, range(200)))

        def settled() -> tuple[int, int, int]:
            """The state when the last one that hung up is forgotten."""
            while ask(one.port, "POST", "/v1/completions", _QUICK).status != 200:
                pass
            return one.state()

        wave(), wave()
        before = settled()
        for _ in range(3):
            counts = wave()
            assert set(counts) <= {0, 200, 400, 413, 429, 503}
            # Of 140 that ask well, one and the queue of 16 are answered at least.
            assert counts[200] >= 17
            assert (counts[0], counts[400], counts[413]) == (20, 20, 20)
        after = settled()
        # A thousand requests held at once their bodies and answers; none of it is left. malloc
        # keeps up to 2 MiB at the top of each heap (`lowtide.memory.heap`).
        assert after[0] - before[0] < 4 << 20
        assert after[1] <= before[1]
        assert after[2] <= before[2]
        code, err = one.end()
        assert code == 0, err
        assert "Traceback" not in err


_QUICK = {"model": "base", "prompt": "x", "max_tokens": 1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly_in_the_middle_of_an_answer(number: int, model: Path) -> None:
    with processed("--model", model) as one, connected(one.port) as client:
        client.sendall(request_bytes(one.port, stream=True, max_tokens=2000))
        assert b"200 OK" in client.recv(1 << 16)
        code, err = one.end(number)
        told = all_of(client)
    assert code == 0, err
    assert "Traceback" not in err
    assert b"the server is ending" in told or b"[DONE]" in told


def test_a_port_in_use(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = small.run("serve", "--model", model, "--port", port)
    assert done.code == 2
    assert f"port {port} of 127.0.0.1 is in use" in done.err
    assert "--port 0 takes a free one" in done.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines, so requests must bring a"),
        (["--host", "::"], "Give one with --token or LOWTIDE_SERVE_TOKEN, or leave --host out."),
        (["--host", "0.0.0.0", "--token", "short"], "the token has 5 characters; expected 16"),
        (["--token", "with spaces in it, and long"], "printable ASCII without spaces"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid: "),
        (["--host", "192.0.2.1", "--token", "0" * 16], "cannot be listened to: "),
        (["--port", 70000], "port = 70000: expected at most 65535"),
        (["--allow-origin", "*"], "--allow-origin *: expected the scheme, host and port"),
        (["--allow-origin", "http://a/b"], "expected the scheme, host and port of one page"),
        (["--adapter-path", "no/such"], "no/such is not a directory"),
        (["--adapter-path", "a b=no/such"], "'a b' cannot be a model's name"),
        (["--adapter-path", "base=no/such"], "the name 'base' is taken. Give NAME=PATH."),
        (["--adapter-path", "x=a", "--adapter-path", "x=b"], "the name 'x' is taken"),
        (["--adapter-root", "no/such"], "--adapter-root no/such is not a directory"),
        (["--queue", -1], "queue = -1: expected at least 0"),
    ],
)
def test_what_cannot_be_served(
    flags: list[object], message: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOWTIDE_SERVE_TOKEN", raising=False)
    port = [] if "--port" in flags else ["--port", 0]
    done = small.run("serve", "--model", model, *port, *flags)
    assert done.code == 2
    assert message in done.err


def test_the_models_own_name_is_not_an_adapters(model: Path, adapter: Path) -> None:
    done = small.run("serve", "--model", model, "--port", 0, "--adapter-path", f"tiny={adapter}")
    assert (done.code, "'tiny' is the base model's name" in done.err) == (2, True)
