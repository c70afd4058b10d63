"""The chat in the browser: what it may load and run, and that its parts belong together."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from serving import Running, Starting

import lowtide.serve

HERE = Path(lowtide.serve.__file__).parent


def test_the_policy_lets_in_the_pages_own_script_and_style_and_nothing_else(
    server: Running,
) -> None:
    told = server.ask("GET", "/")
    page = told.body.decode()
    assert (told.status, told.headers["content-type"]) == (200, "text/html; charset=utf-8")
    rules = dict(
        rule.strip().partition(" ")[::2]
        for rule in told.headers["content-security-policy"].split(";")
    )
    assert rules.pop("default-src") == "'none'"
    assert rules.pop("connect-src") == "'self'"
    assert rules.pop("img-src") == "data:"
    for tag, name in (("script", "script-src"), ("style", "style-src")):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert rules.pop(name) == f"'sha256-{digest}'"
    assert set(rules.values()) == {"'none'"}
    assert set(rules) == {"base-uri", "form-action", "frame-ancestors"}
    assert not re.search(r"https?:|//[a-z]|\son[a-z]+=|\sstyle=", page.replace("// ", ""))


def test_text_goes_to_the_page_as_text_only() -> None:
    script = (HERE / "page.js").read_text(encoding="utf-8")
    for way in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function("):
        assert way not in script
    html = (HERE / "page.html").read_text(encoding="utf-8")
    ids = set(re.findall(r'id="(\w+)"', html))
    assert set(re.findall(r'\$\("(\w+)"\)', script)) <= ids


def test_the_page_comes_without_a_token_and_holds_nothing_that_needs_one(start: Starting) -> None:
    server = start(token="0123456789abcdef")
    told = server.ask("GET", "/")
    assert told.status == 200
    assert b"0123456789abcdef" not in told.body
    assert b"tiny" not in told.body
