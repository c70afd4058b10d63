"""Rendered conversations equal transformers' byte for byte; a template's errors are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowtide.data.templates import ChatTemplate
from lowtide.data.tokenizer import Tokenizer
from lowtide.errors import DataError

USER = {"role": "user", "content": "Weather in Malmö & <Lund>?"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Malmö", "n": [1, 2]}}}],
}
CHATS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be brief.\n"}, USER],
    [USER, {"role": "assistant", "content": " Rain 🌧 <b>'soon'</b> "}, USER],
    [USER, CALL, {"role": "tool", "content": '{"t": 3}'}, {"role": "tool", "content": ""}],
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "it's <här> & now"}}]


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompted", [True, False])
def test_equals_transformers(
    messages: list[dict[str, Any]], tools: Any, prompted: bool, qwen: Tokenizer, theirs: Any
) -> None:
    expected = theirs.apply_chat_template(
        messages, tools=tools, add_generation_prompt=prompted, tokenize=False
    )
    assert qwen.render_chat(messages, prompted, tools) == expected
    assert len(expected) > 60


@pytest.mark.parametrize(
    "source",
    [
        "{% if true %}\n  a\n{% endif %}\n b",
        "x\n   {% if true %}a{% endif %}\n   {# note #}\n   {{ 1 }}",
        "{{ messages[-1] | tojson }}",
        "{% for m in messages %}{{ m.role }}{% if true %}{% break %}{% endif %}{% endfor %}",
        "{{ {'b': 'é<&>', 'a': 1} | tojson }} {{ [1] | tojson(indent=2) }}",
        "{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = 1 %}{% endfor %}{{ s.n }}",
        "{{ bos_token }}x{{ eos_token }}{{ pad_token }}",
        "a{% generation %}\n {{ messages[0].content }} {% endgeneration %}\nb",
        "{{ strftime_now('%Y') }} {{ messages[0].content.strip() | trim | upper }}",
        "{{ tools is none }} {{ nothing is defined }} {{ documents }}",
    ],
)
def test_equals_transformers_on_template_features(
    source: str, qwen: Tokenizer, theirs: Any
) -> None:
    messages = [*CHATS[2], CALL]
    expected = theirs.apply_chat_template(messages, chat_template=source, tokenize=False)
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert ChatTemplate(source, special).render(messages) == expected


@pytest.fixture(scope="module")
def theirs(qwen_directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(qwen_directory))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", r"my\.jinja is not a valid Jinja template: line 1: "),
        ("{{ raise_exception('Roles must alternate!') }}", "refuses these messages: Roles must"),
        ("{{ messages[9].role.x }}", "refuses these messages: .*has no element 9"),
        ("{{ 1 + 'a' }}", "refuses these messages: unsupported operand"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages: access to attribute"),
        ("{{ messages.append(1) }}", "refuses these messages: access to attribute 'append'"),
    ],
)
def test_errors_are_the_templates_own(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ChatTemplate(source, origin="my.jinja").render([USER])
