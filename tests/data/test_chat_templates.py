"""Rendered conversations equal transformers' byte for byte; a template's errors are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowtide.data import template_cost
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
        "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{{ messages | length }}"
        "{% endgeneration %}{{ a }}",
        "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.role }}{% endgeneration %}"
        "{% if loop.index == 2 %}{% break %}{% else %}{% continue %}{% endif %}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }}"
        "{% else %}none{% endfor %}{% for m in [] if m %}{% else %}none{% endfor %}",
        "{% macro twice(x) %}{{ x ~ 1 ~ none ~ nothing }}{{ caller() if caller else x * 2 }}"
        "{% endmacro %}{{ twice('é') }}{% call twice('b') %}c{% endcall %}",
        "{% for a in [[1, [2, 3]], [4]] recursive %}{{ loop(a) if a is iterable else a }}"
        "{{ loop.depth }}{% endfor %}",
        "{{ 'x' * 3 + 'y' + (2 ** 10) | string }}{{ 2 ** -1 }}{{ [1] + [2] }}{{ (1, 2) + (3,) }}"
        "{{ 1.5 + 2 }}",
        "{{ messages | tojson(indent=2, ensure_ascii=true) }}{{ 'ü' | tojson(ensure_ascii=true) }}",
        "{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys(['a']) }}{{ namespace(self=1).self }}",
        "{{ [{'b': 'é<&>', 'a': 1}] | tojson(sort_keys=true, separators=(',', ':')) }}",
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
        ("{{ namespace(_a=1)._a }}", "refuses these messages: it stores '_a' in a namespace"),
        ("{% set n = namespace() %}{% set n._a = 1 %}", "refuses these messages: it stores '_a'"),
        ("{{ dict.__class__.x }}", "refuses these messages: access to attribute '__class__'"),
        ("{{ cycler.__init__.__globals__ }}", "refuses these messages: access to attribute"),
        ("{{ dict.mro() }}", "refuses these messages: .* has no attribute 'mro'"),
    ],
)
def test_errors_are_the_templates_own(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ChatTemplate(source, origin="my.jinja").render([USER])


MANY = "range(100000)"


@pytest.mark.parametrize(
    "source",
    [
        f"{{% for a in {MANY} %}}{{% for b in {MANY} %}}{{% endfor %}}{{% endfor %}}",
        f"{{% for a in {MANY} %}}{{% for b in {MANY} if false %}}{{% endfor %}}{{% endfor %}}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10 ** 9) | list }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 10 ** 10 * [1] }}",
        "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}"
        "{% endfor %}",
        "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}"
        "{% endfor %}",
        "{% set n = namespace(s=9) %}{% for i in range(99) %}{% set n.s = n.s * n.s %}{% endfor %}",
    ],
)
def test_a_template_without_end_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_cost, "MAX_TURNS", 5000)
    with pytest.raises(DataError, match=r"my\.jinja refuses these messages: ") as raised:
        ChatTemplate(source, origin="my.jinja").render([USER])
    said = str(raised.value)
    assert any(
        reason in said
        for reason in ("come to an end", "recursion", "Range too big", "it makes a ", "too big")
    ), said


def test_the_bound_is_for_each_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{% for a in range(90) %}{% endfor %}.")
    monkeypatch.setattr(template_cost, "MAX_TURNS", 100)
    assert [template.render([USER]) for _ in range(12)] == ["."] * 12
    monkeypatch.setattr(template_cost, "MAX_TURNS", 89)
    with pytest.raises(DataError, match="does not come to an end: more than 89 turns"):
        template.render([USER])


def test_long_conversations_are_within_the_bound(qwen: Tokenizer) -> None:
    turns = [USER, {"role": "assistant", "content": "Rain."}] * 2000
    assert qwen.render_chat(turns).count("Rain.") == 2000


def test_nested_too_deeply() -> None:
    source = "{% if 1 %}" * 3000 + "{% endif %}" * 3000
    with pytest.raises(DataError, match=r"my\.jinja (is nested too deeply|is not a valid)"):
        ChatTemplate(source, origin="my.jinja").render([USER])


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_under_its_older_names(name: str, qwen: Tokenizer, theirs: Any) -> None:
    source = "{{ messages[0].reasoning_content }} {{ messages[0].thinking }}"
    messages = [{"role": "assistant", "content": "x", name: "so"}]
    expected = theirs.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert ChatTemplate(source).render(messages) == expected == "so so"
