"""Whatever a client sends, it gets an OpenAI error object that names what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Running, Starting

from lowtide.infer.answer import StopText
from lowtide.serve.faults import Fault, fault_of
from lowtide.serve.guard import Access
from lowtide.serve.requests import Defaults, chat_request, completion_request

DEFAULTS = Defaults(64, 0.0, 1.0)
USER = [{"role": "user", "content": "x"}]


def refused(read: Any = chat_request, **more: Any) -> Fault:
    asked = {"model": "m", "messages": USER, **more}
    if read is completion_request:
        asked = {"model": "m", "prompt": "x", **more}
    with pytest.raises(Fault) as told:
        read(json.dumps(asked).encode(), DEFAULTS)
    assert told.value.status == 400
    return told.value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("n", 2, "n = 2 is not supported"),
        ("tools", [{"type": "function"}], "tools = "),
        ("tool_choice", "required", "tool_choice = 'required'"),
        ("logprobs", True, "logprobs = True"),
        ("logprobs", 0, "logprobs = 0"),
        ("top_logprobs", 3, "top_logprobs = 3"),
        ("response_format", {"type": "json_object"}, "response_format = "),
        ("logit_bias", {"5": 1}, "logit_bias = "),
        ("presence_penalty", 0.5, "presence_penalty = 0.5"),
        ("functions", [{}], "functions = "),
        ("min_p", 0.1, "'min_p' is not a parameter that is known here"),
        ("temprature", 1, "'temprature' is not a parameter that is known here; did you mean 'temp"),
        ("temperature", "hot", "temperature is 'hot'; expected a number from 0 to 1e+06"),
        ("temperature", -1, "temperature is -1; expected"),
        ("temperature", True, "temperature is True; expected"),
        ("temperature", 10**400, "temperature is 1000"),
        ("top_p", 1.5, "top_p is 1.5; expected a number from 0 to 1"),
        ("max_tokens", 0, "max_tokens is 0; expected a whole number from 1"),
        ("max_tokens", 1.5, "max_tokens is 1.5; expected a whole number"),
        ("max_completion_tokens", -4, "max_completion_tokens is -4"),
        ("seed", "x", "seed is 'x'; expected a whole number"),
        ("seed", 2**64, "seed is 18446744073709551616"),
        ("stop", 5, "stop is 5; expected up to 16 texts"),
        ("stop", [""], "stop is ['']; expected up to 16 texts"),
        ("stop", ["a"] * 17, "expected up to 16 texts"),
        ("stream", "yes", "stream is 'yes'; expected true or false"),
        ("stream_options", {"include_usage": True}, "stream_options without stream"),
        ("model", None, "model is missing"),
        ("model", 7, "model is 7; expected text"),
        ("messages", None, "messages is missing"),
        ("messages", [], "messages is []; expected a list of messages, at least one"),
        ("messages", "hi", "messages is 'hi'; expected a list"),
        ("messages", ["hi"], "messages[0] is 'hi'; expected an object with role and content"),
        ("messages", [{"role": "tool", "content": "x"}], "messages[0].role is 'tool'; supported:"),
        ("messages", [{"role": ["user"]}], "messages[0].role is ['user']; supported:"),
        ("messages", [*USER, {"role": "user", "content": 5}], "messages[1].content is 5; expected"),
        ("messages", [{"role": "user", "content": "\ud800"}], "half of a surrogate pair"),
        (
            "messages",
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "supported are parts of type 'text' only",
        ),
        (
            "messages",
            [{"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}],
            "messages[0].tool_calls is not supported",
        ),
        ("chat_template_kwargs", {"messages": []}, "chat_template_kwargs names messages"),
    ],
)
def test_what_cannot_be_done_is_named(name: str, value: Any, message: str) -> None:
    fault = refused(**{name: value})
    assert message in fault.message
    assert fault.param == name


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prompt", ["a", "b"], "several prompts in one request are not supported"),
        ("prompt", [], "expected one text, or the token ids of one"),
        ("prompt", [1, -2], "expected one text"),
        ("prompt", [True], "expected one text"),
        ("prompt", 5, "prompt is 5"),
        ("echo", True, "echo = True is not supported"),
        ("best_of", 3, "best_of = 3"),
        ("suffix", "s", "suffix = 's'"),
        ("max_completion_tokens", 3, "'max_completion_tokens' is not a parameter"),
    ],
)
def test_what_a_completion_cannot_be(name: str, value: Any, message: str) -> None:
    assert message in refused(completion_request, **{name: value}).message


def test_several_problems_are_told_together() -> None:
    message = refused(n=2, temperature="x", max_tokens=5, max_completion_tokens=6).message
    assert "n = 2" in message
    assert "temperature is 'x'" in message
    assert "max_tokens is 5 and max_completion_tokens 6" in message


def test_values_that_ask_for_nothing_are_taken() -> None:
    asked = chat_request(
        json.dumps(
            {
                "model": "m", "messages": USER, "n": 1, "tools": None, "logprobs": False,
                "presence_penalty": 0.0, "frequency_penalty": 0, "tool_choice": "none",
                "response_format": {"type": "text"}, "user": "me", "logit_bias": {}, "stop": None,
            }
        ).encode(),
        DEFAULTS,
    )  # fmt: skip
    assert (asked.wanted.max_tokens, asked.wanted.stops, asked.stream) == (64, (), False)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", b"[1]", b'"x"', b'{"model": NaN}', b"[" * 100_000, b"null",
     b'{"seed": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_what_is_not_a_json_object(body: bytes, server: Running) -> None:
    told = server.ask("POST", "/v1/chat/completions", body)
    assert told.status == 400
    assert told.message.startswith("the request's body is")
    assert told.document["error"]["type"] == "invalid_request_error"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
keys = st.sampled_from(
    ["model", "messages", "prompt", "temperature", "top_p", "seed", "stop", "stream", "n", "tools",
     "stream_options", "max_tokens", "max_completion_tokens", "chat_template_kwargs", "logprobs"]
)  # fmt: skip


@given(st.dictionaries(keys | st.text(max_size=5), json_values, max_size=6), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_json_object_is_read_or_refused(document: dict[str, Any], chat: bool) -> None:
    read = chat_request if chat else completion_request
    base = {"model": "m", "messages": USER} if chat else {"model": "m", "prompt": "x"}
    for asked in (document, {**base, **document}):
        statuses = []
        try:
            read(json.dumps(asked).encode(), DEFAULTS)
        except Fault as fault:
            json.dumps(fault.document()).encode()
            statuses.append(fault.status)
        assert statuses in ([], [400])


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(st.text("abc")))
def test_stops_are_found_as_one_character_after_the_other_comes(
    stops: list[str], pieces: list[str]
) -> None:
    text, expected = "".join(pieces), "".join(pieces)
    for end in range(len(text) + 1):
        if ended := [s for s in stops if text[:end].endswith(s)]:
            expected = text[: end - max(map(len, ended))]
            break
    stop = StopText(stops)
    told = [stop.push(piece) for piece in pieces]
    assert expected.startswith("".join(told))
    assert "".join(told) + stop.finish() == expected
    assert stop.found == (expected != text)


def test_unknown_routes_and_methods(server: Running) -> None:
    told = server.ask("GET", "/v1/nothing")
    assert (told.status, told.message) == (404, "there is no GET /v1/nothing here.")
    told = server.ask("GET", "/v1/chat/completions")
    assert (told.status, told.message) == (405, "/v1/chat/completions takes POST, not GET.")


def test_a_template_that_refuses(server: Running, tmp_path: Any, start: Starting) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception('system prompts are not for me') }}")
    told = start(template=str(template)).chat()
    assert (told.status, "system prompts are not for me" in told.message) == (400, True)


def test_other_pages_and_other_names_are_refused(server: Running) -> None:
    """What a page in the user's browser could send, by DNS rebinding or across origins."""
    port = server.port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"localhost.:{port}"):
        told = server.ask("GET", "/v1/models", headers={"Host": host})
        assert told.status == 403, host
        assert "the Host header is" in told.message
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", f"LOCALHOST:{port}"):
        assert server.ask("GET", "/v1/models", headers={"Host": host}).status == 200
    for origin in ("http://evil.example", "null", f"http://localhost:{port + 1}", "http://"):
        told = server.ask("GET", "/health", headers={"Origin": origin})
        assert told.status == 403
        assert "--allow-origin" in told.message
        assert "access-control-allow-origin" not in told.headers
    own = {"Origin": f"http://127.0.0.1:{port}"}
    assert server.ask("GET", "/health", headers=own).status == 200
    body = {"model": "base", "messages": USER}
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"Content-Type": kind}
        told = server.ask("POST", "/v1/chat/completions", body, headers)
        assert (told.status, "expected application/json" in told.message) == (415, True)
    preflight = server.ask("OPTIONS", "/v1/chat/completions", headers={
        "Origin": "http://evil.example", "Access-Control-Request-Method": "POST",
    })  # fmt: skip
    assert preflight.status == 403


def test_an_origin_that_was_allowed(start: Starting) -> None:
    server = start(origins=["http://localhost:3000"])
    headers = {"Origin": "http://localhost:3000"}
    told = server.ask("GET", "/v1/models", headers=headers)
    assert told.headers["access-control-allow-origin"] == "http://localhost:3000"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-a"}
    assert server.ask("OPTIONS", "/v1/completions", headers={**headers, **asked}).status == 200
    other = server.ask("GET", "/v1/models", headers={"Origin": "http://localhost:3001"})
    assert other.status == 403
    assert "access-control-allow-origin" not in other.headers


def test_a_token(start: Starting) -> None:
    token = "0123456789abcdef"
    server = start(token=token)
    for header in ("", "Bearer", f"Bearer {token}x", f"Bearer {token[:-1]}", f"Basic {token}",
                   token, "Bearer \xff"):  # fmt: skip
        told = server.ask("GET", "/v1/models", headers={"Authorization": header})
        assert told.status == 401, header
        assert told.document["error"]["type"] == "authentication_error"
        assert told.headers["www-authenticate"] == "Bearer"
    assert server.ask("GET", "/v1/models").status == 401
    assert server.ask("POST", "/v1/load_lora_adapter", {}).status == 401
    for scheme in ("Bearer", "bearer"):
        headers = {"Authorization": f"{scheme} {token}"}
        assert server.ask("GET", "/v1/models", headers=headers).status == 200
    assert server.ask("GET", "/health").status == 200


def test_names_do_not_matter_where_a_token_does() -> None:
    access = Access(loopback=False, port=80, token="0123456789abcdef")
    headers = [(b"host", b"my.machine"), (b"authorization", b"Bearer 0123456789abcdef")]
    access.check({"type": "http", "path": "/v1/models", "method": "GET", "headers": headers})


def test_failures_of_the_machine() -> None:
    assert fault_of(MemoryError()).status == 503
    assert (
        fault_of(RuntimeError("can't allocate memory: you tried to allocate 9 bytes")).status == 503
    )
    told = fault_of(KeyError("secret"))
    assert (told.status, "secret" in told.message) == (500, False)
