"""Clients that are too many, too slow, too large or gone."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import Running, Starting, all_of, connected, request_bytes

from lowtide.serve import guard, patience
from lowtide.serve.engine import Ticket
from lowtide.serve.replies import Reply


class Gate:
    """Holds every answer at its `after`-th token until it is opened, or its client is gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int = 3) -> None:
        self._open, self.reached, seen = threading.Event(), threading.Event(), Counter[int]()
        look = Ticket.look

        def held(ticket: Ticket) -> None:
            seen[id(ticket)] += 1
            if seen[id(ticket)] > after:
                self.reached.set()
                while not ticket.cancelled and not self._open.wait(0.005):
                    pass
            look(ticket)

        monkeypatch.setattr(Ticket, "look", held)

    def open(self) -> None:
        self._open.set()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_ends_its_answer(
    stream: bool, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with connected(server.port) as one:
        one.sendall(request_bytes(server.port, stream=stream))
        assert gate.reached.wait(60)
    # The gate never opens: only the other side's end lets the model go on to the next request.
    monkeypatch.undo()
    assert server.chat().status == 200
    assert server.said[0] == "base: the client has gone"


def test_one_that_hangs_up_while_it_waits_is_not_answered(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with connected(server.port) as one, ThreadPoolExecutor() as pool:
        one.sendall(request_bytes(server.port))
        assert gate.reached.wait(60)
        with connected(server.port) as other:
            other.sendall(request_bytes(server.port))
            while not server.engine._waiting:
                pass
            (waiting,) = server.engine._waiting
        while not waiting.cancelled:
            pass
        last = pool.submit(server.chat)
        gate.open()
        assert b"200 OK" in one.recv(1 << 16)
        assert last.result().status == 200
    assert sum("tokens in" in line for line in server.said) == 2


def test_the_queue_is_bounded(start: Starting, monkeypatch: pytest.MonkeyPatch) -> None:
    server, gate = start(queue=2), Gate(monkeypatch)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(server.chat)
        assert gate.reached.wait(60)
        waiting = [pool.submit(server.chat) for _ in range(2)]
        while len(server.engine._waiting) < 2:
            pass
        refused = server.chat()
        assert (refused.status, refused.document["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert "2 are waiting already" in refused.message
        gate.open()
        assert {one.result().status for one in [first, *waiting]} == {200}
    assert server.chat().status == 200


def test_a_queue_of_none_still_answers(start: Starting) -> None:
    server = start(queue=0)
    assert [server.chat().status for _ in range(2)] == [200, 200]


def test_a_body_that_is_too_large(server: Running) -> None:
    body = b'{"prompt": "' + b"x" * (5 * guard.MAX_BODY_BYTES) + b'"}'
    told = server.ask("POST", "/v1/completions", body)
    assert (told.status, "more than 1,048,576 bytes" in told.message) == (413, True)
    told = server.ask("POST", "/v1/completions", iter([body]))  # in chunks, of no declared length
    assert told.status == 413
    expecting = {"Expect": "100-continue", "Content-Length": "9000000"}
    with connected(server.port) as one:
        fields = {"Host": f"127.0.0.1:{server.port}", "Content-Type": "application/json"}
        head = "".join(f"{key}: {value}\r\n" for key, value in {**fields, **expecting}.items())
        one.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode())
        assert all_of(one).startswith(b"HTTP/1.1 413 ")  # at once: nothing was sent
    assert server.chat().status == 200


def test_bodies_that_are_held_are_bounded(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_HELD_BYTES", 2000)
    whole = request_bytes(server.port, user="x" * 1500)
    with connected(server.port) as one:
        one.sendall(whole[:-10])
        while True:
            told = server.chat("y" * 900)
            if told.status == 503:
                break
        assert "too many large requests" in told.message
        one.sendall(whole[-10:])
        assert b"200 OK" in one.recv(1 << 16)
    assert server.chat("y" * 900).status == 200


def test_a_body_that_does_not_come(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    with connected(server.port) as one:
        one.sendall(request_bytes(server.port)[:-5])
        assert all_of(one).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("begun", [b"", b"GET /health HT"])
def test_headers_that_do_not_come(
    begun: bytes, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "REQUEST_SECONDS", 0.2)
    with connected(server.port) as one:
        one.sendall(begun)
        assert all_of(one) == b""


def test_headers_that_trickle(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that keep coming do not keep the connection."""
    monkeypatch.setattr(patience, "REQUEST_SECONDS", 0.3)
    with connected(server.port) as one:
        one.settimeout(0.05)
        one.sendall(b"GET /health HTTP/1.1\r\n")
        ended = False
        for number in range(2000):  # 100 seconds' worth of headers, if it were never ended
            try:
                one.sendall(b"X-%d: 1\r\n" % number)
                ended = one.recv(100) == b""
            except TimeoutError:
                continue
            except OSError:
                ended = True
            if ended:
                break
        assert ended


def test_headers_that_do_not_end(server: Running) -> None:
    with connected(server.port) as one:
        one.sendall(b"GET /health HTTP/1.1\r\nX: " + b"x" * 200_000)
        assert all_of(one).startswith(b"HTTP/1.1 4")


def test_what_is_not_http(server: Running) -> None:
    with connected(server.port) as one:
        one.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert all_of(one).startswith(b"HTTP/1.1 400 ")


def test_a_client_that_does_not_read(start: Starting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection ends, and until then it does not hold the model."""
    monkeypatch.setattr(patience, "READING_SECONDS", 0.3)
    piece, padding = Reply.piece, b": " + b"x" * 4000 + b"\n\n"
    # More than the kernel's buffers and the server's take.
    monkeypatch.setattr(Reply, "piece", lambda self, text: padding + piece(self, text))
    server = start(send_buffer=4096)
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", server.port))
        one.sendall(request_bytes(server.port, stream=True, max_tokens=200, temperature=1, seed=1))
        while not server.engine._current:
            pass
        assert server.chat().status == 200
        connections = server.server.server_state.connections
        while any(each.client == one.getsockname() for each in connections.copy()):
            pass
    assert server.chat().status == 200


def test_connections_are_bounded(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "MOST_CONNECTIONS", 3)
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
    try:
        while len(server.server.server_state.connections) < 3:
            pass
        told = server.ask("GET", "/health")
        assert (told.status, told.headers["retry-after"]) == (503, "1")
        assert told.message == "too many connections."
    finally:
        for one in held:
            one.close()
    while server.server.server_state.connections:
        pass
    assert server.ask("GET", "/health").status == 200
