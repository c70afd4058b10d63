"""Servers in this process, on a free port of the loopback interface."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small
from serving import POSITIONS, Running, Starting, write_adapter

import lowtide as lt
from lowtide.data.tokenizer import Tokenizer
from lowtide.infer.answer import Answerer
from lowtide.serve.app import Service, make_app
from lowtide.serve.catalogue import Catalogue
from lowtide.serve.engine import Engine
from lowtide.serve.guard import Access
from lowtide.serve.listen import Server, bound, resolve
from lowtide.serve.requests import Defaults


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("models") / "tiny"
    return small.write_small_model(directory, max_position_embeddings=POSITIONS)


@pytest.fixture
def adapter(tmp_path: Path, model: Path) -> Path:
    return write_adapter(model, tmp_path / "tuned", 1)


@pytest.fixture
def start(model: Path) -> Iterator[Starting]:
    """Starts servers that end with the test."""
    started: list[tuple[Running, threading.Thread]] = []

    def begin(
        paths: dict[str, Path] | None = None,
        root: Path | None = None,
        queue: int = 16,
        template: str | None = None,
        send_buffer: int | None = None,
        **access: Any,
    ) -> Running:
        decoder = lt.load_model(model)
        tokenizer = Tokenizer.load(model, template)
        said: list[str] = []
        catalogue = Catalogue(decoder, paths or {}, said.append, root)
        engine = Engine(Answerer(decoder, tokenizer), catalogue, queue, said.append)
        listening = bound(*resolve("127.0.0.1", 0))
        if send_buffer is not None:  # of every connection
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        port = listening.getsockname()[1]
        asking = Access(loopback=True, port=port, **access)
        app = make_app(Service(engine, catalogue, Defaults(64, 0.0, 1.0), asking))
        server = Server(app, engine.stop)
        thread = threading.Thread(target=server.run, args=[[listening]])
        running = Running(port, engine, catalogue, server, said)
        started.append((running, thread))
        thread.start()
        while not server.started:
            assert thread.is_alive()
        return running

    yield begin
    for running, thread in started:
        running.server.should_exit = True
        thread.join()
        running.engine.join(60)


@pytest.fixture
def server(start: Starting) -> Running:
    return start()
