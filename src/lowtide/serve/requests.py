"""Requests of OpenAI's API, checked: what cannot be done as asked is refused by name."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from lowtide.data.prompts import prompt_ids
from lowtide.data.templates import Message
from lowtide.data.tokenizer import Tokenizer, unencodable
from lowtide.errors import shown
from lowtide.infer.answer import Wanted
from lowtide.infer.generate import Sampling

from .faults import Fault
from .fields import Fields

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
}  # fmt: skip
_REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False,), "top_logprobs": (0,), "echo": (False,),
    "suffix": ("",), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "logit_bias": ({},), "presence_penalty": (0, 0.0), "frequency_penalty": (0, 0.0),
    "modalities": (["text"],), "audio": (), "prediction": (), "reasoning_effort": (),
    "web_search_options": (), "store": (False,), "verbosity": ("medium",),
}  # fmt: skip
"""Parameters that are not supported -> values of theirs that ask for nothing."""
_HARMLESS = (
    "user", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier",
    "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip
"""Parameters that change nothing in an answer."""


@dataclass(frozen=True)
class Defaults:
    """What requests want that do not say."""

    max_tokens: int
    temperature: float
    top_p: float


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        model: name of the base model or an adapter.
        chat: whether it is a conversation, or a text to go on with.
        wanted: what the answer should be like.
        stream: whether the answer comes in pieces.
        usage: whether the stream ends with counts of tokens.
        encode: makes the prompt's token ids.
    """

    model: str
    chat: bool
    wanted: Wanted
    stream: bool
    usage: bool
    encode: Callable[[Tokenizer], list[int]]


def parsed(body: bytes) -> dict[str, Any]:
    """A request's JSON object.

    Args:
        body: as it came.

    Returns:
        The object.

    Raises:
        Fault: it is something else.
    """
    try:
        document = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Fault(400, f"the request's body is not valid JSON: {why}.") from None
    if not isinstance(document, dict):
        raise Fault(400, f"the request's body is {shown(document)}; expected a JSON object.")
    return document


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def chat_request(body: bytes, defaults: Defaults) -> Asked:
    """A request of POST /v1/chat/completions.

    Args:
        body: as it came.
        defaults: for what it does not say.

    Returns:
        The request.

    Raises:
        Fault: names everything that cannot be done as asked.
    """
    fields = Fields(parsed(body))
    messages = fields.take("messages", _messages, required=True) or []
    variables = fields.take("chat_template_kwargs", _variables) or {}

    def encode(tokenizer: Tokenizer) -> list[int]:
        if tokenizer.template is None:
            raise Fault(
                400, "the model has no chat template, so a conversation cannot be written as the "
                "text that it reads. Start the server with --chat-template FILE (Jinja), or use "
                "/v1/completions.", param="messages",
            )  # fmt: skip
        text = tokenizer.template.render(messages, True, variables=variables)
        return tokenizer.encode(text, add_special_tokens=False)

    return _asked(fields, defaults, encode, chat=True)


def completion_request(body: bytes, defaults: Defaults) -> Asked:
    """A request of POST /v1/completions; arguments as in `chat_request`."""
    fields = Fields(parsed(body))
    prompt = fields.take("prompt", _prompt, required=True) or ""

    def encode(tokenizer: Tokenizer) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        return prompt_ids(tokenizer, prompt, chat=False)

    return _asked(fields, defaults, encode, chat=False)


def _asked(
    fields: Fields, defaults: Defaults, encode: Callable[[Tokenizer], list[int]], chat: bool
) -> Asked:
    model = fields.text("model", required=True)
    temperature = fields.number("temperature", defaults.temperature, 0.0, 1e6)
    top_p = fields.number("top_p", defaults.top_p, 0.0, 1.0)
    if top_p == 0.0:
        temperature, top_p = 0.0, 1.0  # the likeliest token alone
    seed = fields.whole("seed", None, -(2**63), 2**63 - 1)
    max_tokens = fields.whole("max_tokens", None, 1, 2**31)
    newer = fields.whole("max_completion_tokens", None, 1, 2**31) if chat else None
    if None not in (max_tokens, newer) and max_tokens != newer:
        fields.wrong("max_tokens", f"max_tokens is {max_tokens} and max_completion_tokens {newer}")
    stops = fields.take("stop", _stops) or ()
    stream = fields.flag("stream")
    options = fields.take("stream_options", _stream_options)
    if options is not None and not stream:
        fields.wrong("stream_options", "stream_options without stream")
    fields.end(_REFUSED, _HARMLESS)
    sampling = Sampling(temperature, top_p, seed=random.getrandbits(63) if seed is None else seed)
    wanted = Wanted(newer or max_tokens or defaults.max_tokens, sampling, stops)
    return Asked(model, chat, wanted, stream, bool(options), encode)


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"is {shown(value)}; expected a list of messages, at least one")
    return [_message(place, one) for place, one in enumerate(value)]


def _message(place: int, value: Any) -> Message:
    where = f"[{place}]"
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {shown(value)}; expected an object with role and content")
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"{where}.role is {shown(role)}; supported: {', '.join(_ROLES)}")
    turn: dict[str, Any] = {"role": _ROLES[role], "content": _content(where, value.get("content"))}
    for key, one in value.items():
        if key in ("name", "reasoning_content") and isinstance(one, str):
            turn[key] = _readable(f"{where}.{key}", one)
        elif key not in ("role", "content") and one not in (None, [], {}, ""):
            raise ValueError(f"{where}.{key} is not supported; leave it out")
    return turn


def _content(where: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return _readable(f"{where}.content", value)
    if not isinstance(value, list):
        raise ValueError(f"{where}.content is {shown(value)}; expected text")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"{where}.content holds {shown(part)}; supported are parts of type 'text' only"
            )
        texts.append(_readable(f"{where}.content", part["text"]))
    return "".join(texts)


def _readable(where: str, text: str) -> str:
    if (problem := unencodable(text)) is not None:
        raise ValueError(f"{where} is not text: {problem}")
    return text


def _variables(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"is {shown(value)}; expected an object")
    taken = {"messages", "tools", "documents", "add_generation_prompt"} & set(value)
    if taken:
        raise ValueError(f"names {', '.join(sorted(taken))}, which the server itself sets")
    return value


def _prompt(value: Any) -> str | list[int]:
    one = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(one, str):
        return _readable("", one)
    if isinstance(value, list) and value and isinstance(value[0], int):
        one = value
    ids = isinstance(one, list) and one and all(type(i) is int and i >= 0 for i in one)
    if not ids:
        raise ValueError(
            f"is {shown(value)}; expected one text, or the token ids of one: several prompts in "
            "one request are not supported"
        )
    return list(one)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    fits = isinstance(stops, list) and len(stops) <= 16
    if not fits or not all(isinstance(s, str) and 0 < len(s) <= 500 for s in stops):
        raise ValueError(f"is {shown(value)}; expected up to 16 texts of 1 to 500 characters")
    return tuple(stops)


def _stream_options(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("include_usage", False), bool):
        raise ValueError(f"is {shown(value)}; expected {{'include_usage': true or false}}")
    unknown = {key for key, one in value.items() if one} - {"include_usage"}
    if unknown - {"include_obfuscation"}:
        raise ValueError(f"names {', '.join(sorted(unknown))}; supported: include_usage")
    return bool(value.get("include_usage"))
