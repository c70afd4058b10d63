"""Where the server listens, and how it starts and ends."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from lowtide.errors import ConfigError

from .patience import IDLE_SECONDS, Patience

_ENDING_SECONDS = 10
_BACKLOG = 512


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """The one address of a host.

    Args:
        host: a name or an address.
        port: of the server; 0 lets the system choose.

    Returns:
        The family, and what `bind` takes.

    Raises:
        ConfigError: there is none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"--host {host}: {error}. Give an address of this machine, such as 127.0.0.1."
        ) from None
    # `localhost` is often both ::1 and 127.0.0.1; clients try both, and 127.0.0.1 always works.
    family, _, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    return family, (str(address[0]), int(address[1]))


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach an address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def bound(family: socket.AddressFamily, address: tuple[str, int]) -> socket.socket:
    """A socket that holds an address.

    Args:
        family: of the address.
        address: as `resolve` gives it.

    Returns:
        The socket, which listens: whoever connects now waits until the server runs.

    Raises:
        ConfigError: the address is in use, or is not this machine's.
    """
    host, port = address
    one = socket.socket(family, socket.SOCK_STREAM)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        one.bind(address)
        one.listen(_BACKLOG)
    except OSError as error:
        one.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} is in use: another program listens there, perhaps another "
                "`lowtide serve`. End it, or choose another port with --port; --port 0 takes a "
                "free one."
            ) from None
        raise ConfigError(
            f"port {port} of {host} cannot be listened to: {error.strerror}. Choose others with "
            "--host and --port."
        ) from None
    return one


class Server(uvicorn.Server):
    """uvicorn's, which ends without passing the signal on: it is how a server is ended."""

    def __init__(self, app: ASGIApp, on_end: Callable[[], None]) -> None:
        """Not yet started; `run` serves on bound sockets until Ctrl-C or SIGTERM.

        Args:
            app: the application.
            on_end: called when the server begins to end, before connections do.
        """
        config = uvicorn.Config(
            app, http=Patience, ws="none", lifespan="off", log_config=None, log_level="error",
            access_log=False, server_header=False, proxy_headers=False,
            backlog=_BACKLOG, timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=_ENDING_SECONDS,
        )  # fmt: skip
        super().__init__(config)
        self._on_end = on_end

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End; a second Ctrl-C does not wait for answers to end."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers end before connections do."""
        self._on_end()
        await super().shutdown(sockets)
