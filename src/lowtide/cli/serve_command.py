"""`lowtide serve`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowtide.config import setting
from lowtide.errors import ConfigError
from lowtide.infer.answer import Answerer

from .output import Output, settings_of
from .speaking import ContextSettings

if TYPE_CHECKING:
    import socket

TOKEN_VARIABLE = "LOWTIDE_SERVE_TOKEN"
_SHORTEST_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class ServeSettings(ContextSettings):
    """Settings of `lowtide serve`."""

    adapter_path: tuple[str, ...] = setting(
        (),
        help="PEFT adapter directory, or NAME=DIR, that requests call by its name; read again "
        "when it changes; may be given several times",
        filled=True,
        metavar="DIR",
    )
    adapter_root: str | None = setting(
        None, help="directory below which requests may load further adapters", filled=True,
        metavar="DIR",
    )  # fmt: skip
    host: str = setting("127.0.0.1", help="address to listen on", filled=True)
    port: int = setting(8080, help="port to listen on; 0 takes a free one", minimum=0,
                        maximum=65535)  # fmt: skip
    token: str | None = setting(
        None,
        help="what requests must bring as their API key; needed for any --host that other "
        f"machines can reach; the variable {TOKEN_VARIABLE} keeps it out of the list of processes",
        filled=True,
    )
    allow_origin: tuple[str, ...] = setting(
        (),
        help="origin of a web page that may use the server, such as http://localhost:3000; may be "
        "given several times",
        filled=True,
    )
    queue: int = setting(
        16, help="requests that may wait for the model; more are refused with 429", minimum=0,
        maximum=200,
    )  # fmt: skip

    def checked_token(self, loopback: bool) -> str | None:
        """The token that requests must bring."""
        token = self.token or os.environ.get(TOKEN_VARIABLE) or None
        if token is None and not loopback:
            raise ConfigError(
                f"--host {self.host} can be reached from other machines, so requests must bring a "
                f"token. Give one with --token or {TOKEN_VARIABLE}, or leave --host out."
            )
        if token is not None and (len(token) < _SHORTEST_TOKEN or not _printable(token)):
            raise ConfigError(
                f"the token has {len(token)} characters; expected {_SHORTEST_TOKEN} or more, "
                "printable ASCII without spaces. `openssl rand -hex 16` makes one."
            )
        return token


def _printable(token: str) -> bool:
    return token.isascii() and token.isprintable() and " " not in token


def _check_origins(origins: Sequence[str]) -> None:
    for origin in origins:
        scheme, _, rest = origin.partition("://")
        if scheme not in ("http", "https") or not rest or "/" in rest or "*" in rest:
            raise ConfigError(
                f"--allow-origin {origin}: expected the scheme, host and port of one page, such "
                "as http://localhost:3000."
            )


def run(argv: Sequence[str]) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    settings, output = settings_of(
        ServeSettings, "serve", "An OpenAI-compatible endpoint, and a chat in the browser.", argv
    )
    from lowtide.serve.catalogue import named_paths
    from lowtide.serve.listen import bound, is_loopback, resolve

    family, address = resolve(settings.host, settings.port)
    settings.checked_token(is_loopback(address[0]))
    _check_origins(settings.allow_origin)
    paths = named_paths(settings.adapter_path)
    root = None if settings.adapter_root is None else Path(settings.adapter_root).expanduser()
    if root is not None and not root.is_dir():
        raise ConfigError(f"--adapter-root {root} is not a directory.")
    with bound(family, address) as listening:
        _serve(settings, output, listening, paths, root)
    return 0


def _serve(
    settings: ServeSettings,
    output: Output,
    listening: socket.socket,
    paths: dict[str, Path],
    root: Path | None,
) -> None:
    from lowtide.serve.app import Service, make_app
    from lowtide.serve.catalogue import Catalogue
    from lowtide.serve.engine import Engine
    from lowtide.serve.guard import Access
    from lowtide.serve.listen import Server, is_loopback
    from lowtide.serve.requests import Defaults

    output.goes_on = True
    model, tokenizer = settings.opened()
    catalogue = Catalogue(model, paths, output.say, root)
    host, port = listening.getsockname()[:2]
    loopback = is_loopback(host)
    token = settings.checked_token(loopback)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    output.say(
        f"{url} in a browser, {url}/v1 in other clients: "
        f"{', '.join(catalogue.names)}. Ctrl-C ends it."
    )
    if tokenizer.template is None:
        output.say(
            "The model has no chat template: only /v1/completions answers. Pass one with "
            "--chat-template FILE."
        )
    answerer = Answerer(model, tokenizer, settings.context)
    engine = Engine(answerer, catalogue, settings.queue, output.say)
    defaults = Defaults(settings.max_tokens, settings.temperature, settings.top_p)
    access = Access(loopback, port, token, settings.allow_origin)
    service = Service(engine, catalogue, defaults, access)
    output.result({"url": url, "models": catalogue.names})
    try:
        Server(make_app(service), engine.stop).run([listening])
    finally:
        engine.stop()
        engine.join(10.0)
