"""The chat in the browser: one document that needs nothing else, and lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from starlette.responses import Response

from .replies import HEADERS

_HERE = Path(__file__).parent


def page_response() -> Response:
    """The page, with a policy under which no other script, style, image or frame can play a part.

    Returns:
        The response to GET /.
    """
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    html = (_HERE / "page.html").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    headers = {**HEADERS, "content-security-policy": policy, "x-frame-options": "DENY"}
    body = html.replace("STYLE", style).replace("SCRIPT", script)
    return Response(body, headers=headers, media_type="text/html")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest())
    return f"'sha256-{digest.decode()}'"
