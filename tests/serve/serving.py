"""A server in this process, and how to talk to it."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lowtide as lt
from lowtide.model.adapter import Adapter
from lowtide.serve.catalogue import Catalogue
from lowtide.serve.engine import Engine
from lowtide.serve.listen import Server

POSITIONS = 2048


def write_adapter(model: Path, directory: Path, seed: int) -> Path:
    """An adapter with B away from zero."""
    decoder = lt.load_model(model)
    adapter = Adapter.create(decoder, lt.LoraConfig(r=4, lora_alpha=64), seed=seed)
    for name, parameter in adapter.items():
        if ".lora_B." in name:
            parameter.copy_(parameter.new_ones(parameter.shape) * 0.05 * seed)
    adapter.save(directory)
    return directory


@dataclass
class Reply:
    """An HTTP response, read."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.body)
        return document

    @property
    def message(self) -> str:
        """The error object's message."""
        return str(self.document["error"]["message"])


@dataclass
class Running:
    """A server, and how to talk to it."""

    port: int
    engine: Engine
    catalogue: Catalogue
    server: Server
    said: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Reply:
        """One request on a connection of its own."""
        return ask(self.port, method, path, body, headers)

    def chat(self, content: str = "The", **more: Any) -> Reply:
        """POST /v1/chat/completions, greedily."""
        asked = {"model": "base", "temperature": 0, "max_tokens": 8, **more}
        messages = [{"role": "user", "content": content}]
        return self.ask("POST", "/v1/chat/completions", {"messages": messages, **asked})


def ask(
    port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> Reply:
    """One request to a port of this machine, on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    plain = isinstance(body, dict | list | str)
    sent = json.dumps(body).encode() if plain else body
    kind = {} if body is None else {"Content-Type": "application/json"}
    try:
        connection.request(method, path, sent, {**kind, **(headers or {})})
        response = connection.getresponse()
        fields = {key.lower(): value for key, value in response.getheaders()}
        return Reply(response.status, fields, response.read())
    finally:
        connection.close()


Starting = Callable[..., Running]


def request_bytes(port: int, **more: Any) -> bytes:
    asked = {"model": "base", "messages": [{"role": "user", "content": "x"}], **more}
    body = json.dumps({"max_tokens": 100, "temperature": 0, **asked}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as one:
        yield one


def all_of(one: socket.socket) -> bytes:
    """What comes until the other side closes."""
    parts = []
    try:
        while part := one.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)
