"""Who may ask, and how much: checked before a request is read.

A page that the user has open in a browser can send requests to this machine. Three checks keep
such pages out: the Host header must name this machine (DNS rebinding), an Origin header must be
the server's own or one that was allowed, and a body must be declared as JSON, which no foreign
page can do without asking first (CORS), to which the answer is no.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Collection
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from .faults import Fault
from .replies import fault_response

MAX_BODY_BYTES = 1 << 20
_HELD_BYTES = 16 << 20
_DISCARDED_BYTES = 64 << 20
BODY_SECONDS = 20.0
OPEN_PATHS = ("/", "/health")
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        loopback: whether only this machine can reach the server.
        port: of the server.
        token: what requests must bring; None asks for none.
        origins: origins of other pages that may ask.
    """

    loopback: bool
    port: int
    token: str | None = None
    origins: Collection[str] = ()

    def check(self, scope: Scope) -> None:
        """Refuse a request that may not ask.

        Args:
            scope: the request's.

        Raises:
            Fault: says why.
        """
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.loopback and host.lower() not in self._hosts():
            raise Fault(
                403, f"the Host header is {host!r}; this server answers to "
                f"http://127.0.0.1:{self.port} and http://localhost:{self.port} only.",
                code="host_not_allowed",
            )  # fmt: skip
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", *self.origins):
            raise Fault(
                403, f"pages of {origin!r} may not use this server. Start it with --allow-origin "
                f"{origin} if they should.", code="origin_not_allowed",
            )  # fmt: skip
        if self.token is not None and scope["path"] not in OPEN_PATHS:
            self._check_token(headers.get("authorization", ""))
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise Fault(
                415, f"the Content-Type is {kind!r}; expected application/json.",
                code="content_type",
            )  # fmt: skip

    def _hosts(self) -> list[str]:
        bare = list(_LOCAL_NAMES) if self.port == 80 else []
        return [f"{name}:{self.port}" for name in _LOCAL_NAMES] + bare

    def _check_token(self, authorization: str) -> None:
        scheme, _, given = authorization.partition(" ")
        assert self.token is not None
        same = hmac.compare_digest(_digest(given.strip()), _digest(self.token))
        if not same or scheme.lower() != "bearer":
            raise Fault(
                401, "this server needs its token: Authorization: Bearer TOKEN (in most clients, "
                "the API key).", code="invalid_api_key",
            )  # fmt: skip


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


class Guard:
    """Passes on what `access` lets in; everything that goes out says that it is for nobody else."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        """Wrap an application."""
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            try:
                self._access.check(scope)
            except Fault as fault:
                await fault_response(fault)(scope, receive, send)
                return
        await self._app(scope, receive, send)


@dataclass
class Bodies:
    """Reads bodies, of which only so many bytes are held at a time."""

    held: int = field(default=0, init=False)

    async def read(self, request: Request) -> bytes:
        """A request's body.

        Args:
            request: whose body has not been read.

        Returns:
            All of it.

        Raises:
            Fault: it is too large, comes too slowly, or too many are held.
        """
        declared = request.headers.get("content-length", "0")
        large = declared.isdecimal() and int(declared[:20]) > MAX_BODY_BYTES
        if large and request.headers.get("expect", "").lower() == "100-continue":
            raise _too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                return await self._all(request, body, large)
        except TimeoutError:
            raise Fault(
                408, f"the request's body did not come within {BODY_SECONDS:.0f} seconds.",
                code="timeout",
            ) from None  # fmt: skip
        finally:
            self.held -= len(body)

    async def _all(self, request: Request, body: bytearray, large: bool) -> bytes:
        dropped = 0
        async for chunk in request.stream():
            if large or dropped or len(body) + len(chunk) > MAX_BODY_BYTES:
                # Read on, so that a client that writes before it reads is told why.
                dropped += len(chunk)
                if dropped > _DISCARDED_BYTES:
                    break
            elif self.held + len(chunk) > _HELD_BYTES:
                raise Fault(503, "too many large requests at a time.", code="busy", retry_after=5)
            else:
                body += chunk
                self.held += len(chunk)
        if large or dropped:
            raise _too_large()
        return bytes(body)


def _too_large() -> Fault:
    return Fault(
        413, f"the request's body has more than {MAX_BODY_BYTES:,} bytes.", code="too_large"
    )
