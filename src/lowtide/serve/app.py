"""The routes: OpenAI's API, adapters loaded and unloaded as vLLM names it, and the page."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from .catalogue import Catalogue
from .engine import Begun, Ended, Engine, Piece, Ticket
from .faults import Fault, fault_of
from .fields import Fields
from .guard import Access, Bodies, Guard
from .page import page_response
from .replies import HEADERS, Reply, fault_event, fault_response, json_response
from .requests import Asked, Defaults, chat_request, completion_request, parsed


@dataclass
class Service:
    """What the routes work with."""

    engine: Engine
    catalogue: Catalogue
    defaults: Defaults
    access: Access
    bodies: Bodies = field(default_factory=Bodies)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, chat_request)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, completion_request)

    async def _answer(self, request: Request, read: Callable[[bytes, Defaults], Asked]) -> Response:
        asked = read(await self.bodies.read(request), self.defaults)
        self.catalogue.check(asked.model)
        ticket = self.engine.submit(asked)
        return _Answering(ticket)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return json_response({"object": "list", "data": self.catalogue.listing()})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        self.catalogue.check(name)
        wanted = self.catalogue.base_name if name not in self.catalogue.names else name
        return json_response(next(m for m in self.catalogue.listing() if m["id"] == wanted))

    async def load(self, request: Request) -> Response:
        """POST /v1/load_lora_adapter."""
        fields = Fields(parsed(await self.bodies.read(request)))
        name, path = fields.text("lora_name", True), fields.text("lora_path", True)
        fields.end({}, ())
        await asyncio.to_thread(self.catalogue.load, name, path)
        return json_response({"loaded": name})

    async def unload(self, request: Request) -> Response:
        """POST /v1/unload_lora_adapter."""
        fields = Fields(parsed(await self.bodies.read(request)))
        name = fields.text("lora_name", True)
        fields.end({}, ())
        self.catalogue.unload(name)
        return json_response({"unloaded": name})

    async def page(self, request: Request) -> Response:
        """GET /."""
        return page_response()

    async def health(self, request: Request) -> Response:
        """GET /health."""
        return json_response({"status": "ok"})


class _Answering(Response):
    """Sends what a ticket brings; a client that hangs up cancels it."""

    def __init__(self, ticket: Ticket) -> None:
        """Nothing has come yet."""
        self.ticket = ticket
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        leaving = asyncio.create_task(_left(receive))
        answering = asyncio.create_task(self._send(scope, receive, send))
        try:
            await asyncio.wait([leaving, answering], return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                await answering
        finally:
            self.ticket.cancel()
            for task in (leaving, answering):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = await self.ticket.event()
        if isinstance(first, Fault):
            await fault_response(first)(scope, receive, send)
            return
        assert isinstance(first, Begun)
        reply = Reply(self.ticket.asked, first.fingerprint)
        if self.ticket.asked.stream:
            await self._stream(reply, send)
        else:
            await (await self._whole(reply))(scope, receive, send)

    async def _whole(self, reply: Reply) -> Response:
        texts = []
        while True:
            event = await self.ticket.event()
            if isinstance(event, Piece):
                texts.append(event.text)
            elif isinstance(event, Ended):
                return json_response(reply.whole("".join(texts), event))
            elif isinstance(event, Fault):
                return fault_response(event)

    async def _stream(self, reply: Reply, send: Send) -> None:
        headers = {**HEADERS, "content-type": "text/event-stream; charset=utf-8"}
        raw = [(key.encode(), value.encode()) for key, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        async for event in self._events(reply):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, reply: Reply) -> AsyncIterator[bytes]:
        for opening in reply.opening():
            yield opening
        while True:
            event = await self.ticket.event()
            if isinstance(event, Piece):
                yield reply.piece(event.text)
            elif isinstance(event, Fault):
                yield fault_event(event)
                return
            elif isinstance(event, Ended):
                for ending in reply.ending(event):
                    yield ending
                return


async def _left(receive: Receive) -> None:
    """Ends when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _on_fault(request: Request, error: Exception) -> Response:
    return fault_response(fault_of(error))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        fault = Fault(404, f"there is no {request.method} {request.url.path} here.")
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        fault = Fault(405, f"{request.url.path} takes {allowed}, not {request.method}.")
    else:
        fault = Fault(error.status_code, error.detail)
    return fault_response(fault)


async def _on_leaving(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it


def make_app(service: Service) -> Starlette:
    """The whole application.

    Args:
        service: what the routes work with.

    Returns:
        An ASGI application.
    """
    routes = [
        Route("/", service.page, methods=["GET"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.completion, methods=["POST"]),
        Route("/v1/models", service.models, methods=["GET"]),
        Route("/v1/models/{name}", service.model, methods=["GET"]),
        Route("/v1/load_lora_adapter", service.load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", service.unload, methods=["POST"]),
        Route("/health", service.health, methods=["GET"]),
    ]
    middleware = [Middleware(Guard, access=service.access)]
    if service.access.origins:
        cors: Any = CORSMiddleware
        allowed = {"allow_origins": list(service.access.origins), "allow_headers": ["*"]}
        middleware.insert(0, Middleware(cors, **allowed, allow_methods=["GET", "POST"]))
    handlers: dict[Any, Any] = {
        Fault: _on_fault,
        HTTPException: _on_http,
        ClientDisconnect: _on_leaving,
        Exception: _on_fault,
    }
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
