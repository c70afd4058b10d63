"""Answers as OpenAI's objects."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from .engine import Ended
from .faults import Fault
from .requests import Asked

HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
"""Of everything that goes out."""


def json_response(
    document: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON document."""
    return Response(_written(document), status, {**HEADERS, **(headers or {})}, "application/json")


def fault_response(fault: Fault) -> Response:
    """An error object."""
    headers = {} if fault.retry_after is None else {"retry-after": str(fault.retry_after)}
    if fault.status == 401:
        headers["www-authenticate"] = "Bearer"
    if fault.status in (408, 413):
        headers["connection"] = "close"
    return json_response(fault.document(), fault.status, headers)


class Reply:
    """The objects that tell of one answer."""

    def __init__(self, asked: Asked, fingerprint: str) -> None:
        """Of an answer that begins."""
        self._asked = asked
        kind = "chatcmpl" if asked.chat else "cmpl"
        name = "chat.completion" if asked.chat else "text_completion"
        streamed = asked.stream and asked.chat
        self._head = {
            "id": f"{kind}-{secrets.token_hex(12)}",
            "object": f"{name}.chunk" if streamed else name,
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, text: str, ended: Ended) -> dict[str, Any]:
        """The answer in one object."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": ended.finish, "logprobs": None}
        if self._asked.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return {**self._head, "choices": [choice], "usage": _usage(ended)}

    def opening(self) -> list[bytes]:
        """What a stream begins with."""
        if not self._asked.chat:
            return []
        return [self._chunk({"delta": {"role": "assistant", "content": ""}})]

    def piece(self, text: str) -> bytes:
        """One piece of a stream."""
        return self._chunk({"delta": {"content": text}} if self._asked.chat else {"text": text})

    def ending(self, ended: Ended) -> list[bytes]:
        """What a stream ends with."""
        last: dict[str, Any] = {"delta": {}} if self._asked.chat else {"text": ""}
        events = [self._chunk(last, ended.finish)]
        if self._asked.usage:
            events.append(_event({**self._head, "choices": [], "usage": _usage(ended)}))
        return [*events, b"data: [DONE]\n\n"]

    def _chunk(self, content: Mapping[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, **content, "finish_reason": finish, "logprobs": None}
        usage = {"usage": None} if self._asked.usage else {}
        return _event({**self._head, "choices": [choice], **usage})


def fault_event(fault: Fault) -> bytes:
    """What a stream that cannot go on ends with."""
    return _event(fault.document())


def _event(document: Mapping[str, Any]) -> bytes:
    return b"data: " + _written(document) + b"\n\n"


def _written(document: Mapping[str, Any]) -> bytes:
    # Half a surrogate pair, which a path may hold, is written as JSON's own escape.
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _usage(ended: Ended) -> dict[str, int]:
    return {
        "prompt_tokens": ended.n_prompt,
        "completion_tokens": ended.n_tokens,
        "total_tokens": ended.n_prompt + ended.n_tokens,
    }
