"""Connections that end when the other side is too slow, or when there are too many of them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from .faults import Fault

MOST_CONNECTIONS = 256
REQUEST_SECONDS = 10.0
"""Until a request's headers are there, from the connection's beginning or the last response."""
IDLE_SECONDS = 60
READING_SECONDS = 30.0
"""That a client may leave what was sent to it unread."""


def _refusal() -> bytes:
    fault = Fault(503, "too many connections.", code="busy")
    body = json.dumps(fault.document()).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


class Patience(H11Protocol):
    """uvicorn's HTTP/1.1, with an end to its patience."""

    _request: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request, or refuse."""
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.write(_refusal())
            transport.close()
            return
        self._request = self.loop.call_later(REQUEST_SECONDS, self._give_up)

    def _give_up(self) -> None:
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """A request's headers must be whole in time, however slowly they trickle."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        working = self.cycle is not None and not self.cycle.response_complete
        if working:
            self._cancel_request()
        elif self._request is None and not self.transport.is_closing():
            self._request = self.loop.call_later(REQUEST_SECONDS, self._give_up)

    def _cancel_request(self) -> None:
        if self._request is not None:
            self._request.cancel()
            self._request = None

    def pause_writing(self) -> None:
        """The client does not read what it gets."""
        super().pause_writing()
        self._reading = self.loop.call_later(READING_SECONDS, self._give_up)

    def resume_writing(self) -> None:
        """The client reads."""
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def on_response_complete(self) -> None:
        """What is left to send must be read in time, too."""
        super().on_response_complete()
        if self.transport.is_closing():
            self.loop.call_later(READING_SECONDS, self._give_up)

    def timeout_keep_alive_handler(self) -> None:
        """Nobody asks any more."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(READING_SECONDS, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """No timer outlives the connection."""
        self._cancel_request()
        super().connection_lost(exc)
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
