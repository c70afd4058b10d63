"""Chat templates that try to get out, to run without end, or to make more than memory holds.

Each ends by itself: with a text of bounded length, or refused. Memory is limited while they run.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from judging import QUICK, Judge, fuzz

from lowtide.data import template_cost
from lowtide.data.templates import ChatTemplate
from lowtide.errors import DataError

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "a\tb %s {} <|x|> é"},
    {"role": "assistant", "content": "c", "tool_calls": [{"function": {"arguments": {"n": 1}}}]},
]
BIG = "{% set b = 'a' * 9999999 %}"
LIST = "{% set l = range(99999) | list %}"
NEST = "{% set l = [l] * 9 %}" * 9
BOMBS = [
    BIG + "{% for i in range(99999) %}{{ b }}{% endfor %}",
    "{% for i in range(99999) %}" + "literal " * 999 + "{% endfor %}",
    "{% macro m() %}" + "x" * 99999 + "{% endmacro %}"
    "{% for i in range(9999) %}{{ m() }}{% endfor %}",
    "{{ 'a'.center(10 ** 10) }}",
    "{{ 'a'.ljust(10 ** 11) }}{{ 'a'.zfill(10 ** 11) }}",
    "{{ ('\t' * 99999).expandtabs(99999) }}",
    BIG + "{{ b.replace('a', b) }}",
    BIG + "{{ b.replace('', b) }}",
    BIG + "{{ b.join(b) }}",
    BIG + "{{ b.join(b.split('a')) }}",
    BIG + "{{ b.join([b] * 999) }}",
    BIG + "{{ b.translate({97: b}) }}",
    BIG + "{{ ('{0}' * 99999).format(b) }}",
    BIG + "{{ ('{a}' * 99999).format_map({'a': b}) }}",
    "{{ '{:99999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 99999999999) }}",
    "{{ '%99999999999d' % 1 }}",
    "{{ '%*d' % (99999999999, 1) }}",
    BIG + "{{ '%s' * 9999 % ((b,) * 9999) }}",
    BIG + "{{ '%(a)s' * 9999 % {'a': b} }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ '%99999999999d' | format(1) }}",
    BIG + "{{ b | replace('a', b) }}",
    BIG + "{{ b | join(b) }}",
    BIG + "{{ range(999) | map('string') | join(b) }}",
    BIG + "{{ range(999) | map('replace', '', b) | list }}",
    BIG + "{{ ('a\n' * 99999) | indent(99999) }}",
    BIG + "{{ ('a\n' * 99999) | indent(b) }}",
    BIG + "{{ b | wordwrap(1, true, b) }}",
    "{{ [1] | batch(10 ** 11, 'x') | list }}{{ [1] | slice(10 ** 11) | list }}",
    LIST + "{% set l = [l] * 99999 %}{{ l }}",
    LIST + "{% set l = [l] * 99999 %}{{ l | tojson }}",
    LIST + "{% set l = [l] * 99999 %}{{ l | string }}",
    LIST + "{% set l = [l] * 99999 %}{{ l ~ '' }}",
    LIST + "{% set l = [l] * 99999 %}{{ l | sum(start=[]) }}",
    LIST + NEST + "{{ l | pprint }}",
    LIST + NEST + "{% set n = namespace(l=l) %}{{ n }}",
    LIST + NEST + "{{ '%s' % l }}{{ '{}'.format(l) }}",
    LIST + "{{ l | tojson(indent=99999) }}",
    "{% set n = namespace(l=[]) %}{% for i in range(99999) %}{% set n.l = [n.l] %}{% endfor %}"
    "{{ n.l | tojson(indent=99) }}",
    "{% set n = namespace(l=[]) %}{% for i in range(99999) %}"
    "{% set n.l = n.l + ['a' * 9999999] %}{% endfor %}",
    LIST + "{% for i in l %}{{ l | sum }}{{ l | sort | length }}{% endfor %}",
    BIG + "{% for i in range(99999) %}{{ (b | upper) | length }}{{ b.lower() }}{% endfor %}",
    "{{ lipsum(n=10 ** 9) }}",
    "{{ (range(99999) | list * 99999) | length }}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s.replace('a', 'aa')"
    ".replace('b', n.s) %}{% endfor %}",
    "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{{ strftime_now('%Y' * 9999999) }}",
]  # fmt: skip
ESCAPES = [
    "{{ ().__class__.__base__.__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') | attr('mro') }}",
    "{{ messages.__class__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ range.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "{{ ('%s' | attr('format'))('{0.__class__}') }}",
    "{{ [messages] | map(attribute='__class__') | list }}",
    "{{ [messages] | groupby('__class__') }}",
    "{{ messages | map('attr', '__class__') | list }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends '/etc/passwd' %}",
    "{{ cycler('a').__init__.__globals__ }}",
    "{{ joiner.__init__ }}",
    "{{ namespace.__init__ }}",
    "{{ loop.__class__ }}{{ caller.__globals__ }}",
    "{{ messages.append(1) }}{{ messages[0].update({}) }}{{ messages[0].pop('role') }}",
    "{{ tojson.__globals__ }}{{ messages | tojson(default=raise_exception) }}",
    "{% set x = messages %}{{ x.__getattribute__('__class__') }}",
    "{{ ([].sort.__self__).__class__ }}{{ (messages | items).gi_frame.f_globals }}",
    "{% for g in [range(3) | map('string')] %}{{ g.gi_frame.f_back.f_globals }}{% endfor %}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_a_bomb_is_refused(source: str, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_cost, "MAX_TURNS", 20_000)
    monkeypatch.setattr(template_cost, "MAX_MADE", 1 << 26)
    judge(lambda: ChatTemplate(source).render(MESSAGES))
    assert dict(judge.counts) == {"DataError": 1}


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_is_reached(source: str) -> None:
    """Refused, or what was reached for is undefined."""
    try:
        written = ChatTemplate(source).render(MESSAGES)
    except DataError:
        return
    told = ("class", "<function", "built-in", "module", "globals", "root:")
    assert not any(one in written.replace("{0.__class__}", "") for one in told), written


NAMES = ("messages", "messages[0]", "b", "l", "n", "m.content", "loop", "true", "none", "nothing")
VALUES = ("'a'", "''", "9", "0", "-1", "99999", "10 ** 9", "[]", "{}", "'{0}'", "'%s'", "(1, 2)")
FILTERS = (
    *("abs", "attr('__class__')", "batch(3)", "capitalize", "center(9)", "count", "default('a')"),
    *("dictsort", "escape", "first", "float", "format(1)", "groupby('role')", "indent(4)", "int"),
    *(
        "items",
        "join(b)",
        "last",
        "length",
        "list",
        "map('string')",
        "map(attribute='role')",
        "max",
    ),
    *("pprint", "random", "reject", "replace('a', b)", "reverse", "round(9)", "select", "safe"),
    *("selectattr('role')", "slice(3)", "sort", "string", "striptags", "sum", "title", "tojson"),
    *("tojson(indent=2)", "trim", "truncate(9)", "unique", "upper", "urlencode", "urlize"),
    *("wordcount", "wordwrap(1)", "xmlattr", "filesizeformat", "forceescape", "min", "d(b)"),
)
METHODS = (
    *("upper()", "split('a')", "replace('a', b)", "join(l)", "center(99999)", "format(b, l)"),
    *("items()", "append(1)", "strip()", "expandtabs(999)", "zfill(99999)", "encode()", "keys()"),
    *("__class__", "mro()", "gi_frame", "translate({97: b})", "format_map(n)", "splitlines()"),
)


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> str:
    """A name or a value, with filters, methods and operators on it."""
    text = draw(st.sampled_from(NAMES + VALUES))
    for _ in range(draw(st.integers(0, depth))):
        kind = draw(st.sampled_from(("filter", "filter", "method", "operator", "index")))
        if kind == "filter":
            text = f"({text} | {draw(st.sampled_from(FILTERS))})"
        elif kind == "method":
            text = f"({text}).{draw(st.sampled_from(METHODS))}"
        elif kind == "index":
            text = f"({text})[{draw(st.sampled_from(VALUES))}]"
        else:
            operator = draw(
                st.sampled_from(("+", "*", "**", "~", "%", "in", "==", "<", "and", "//"))
            )
            text = f"({text} {operator} {draw(st.sampled_from(NAMES + VALUES))})"
    return text


@st.composite
def templates(draw: st.DrawFn, depth: int = 3) -> str:
    """Statements around expressions, often in loops."""
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        one = draw(expressions())
        body = draw(templates(depth - 1)) if depth else "{{ b }}"
        shape = draw(
            st.sampled_from(
                (
                    "{{{{ {0} }}}}",
                    "{{{{ {0} }}}}",
                    "{{% for m in {0} %}}{1}{{% endfor %}}",
                    "{{% for m in range(99) recursive %}}{1}{{% endfor %}}",
                    "{{% if {0} %}}{1}{{% else %}}x{{% endif %}}",
                    "{{% set b = {0} %}}",
                    "{{% set n.s = {0} %}}",
                    "{{% set l = {0} %}}{1}",
                    "{{% macro f(x) %}}{1}{{% endmacro %}}{{{{ f({0}) }}}}",
                    "{{% generation %}}{1}{{% endgeneration %}}",
                    "{{% filter upper %}}{1}{{% endfilter %}}",
                    "{{% set b %}}{1}{{% endset %}}",
                    "{{% call(x) f({0}) %}}{1}{{% endcall %}}",
                )
            )
        )
        parts.append(shape.format(one, body))
    return "".join(parts)


START = (
    "{% set n = namespace(s='ab', l=[1, 'a']) %}{% set b = 'ab\n\t' * 99 %}{% set l = [b] * 99 %}"
)


def _template(source: str, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_cost, "MAX_TURNS", 5_000)
    monkeypatch.setattr(template_cost, "MAX_LENGTH", 1 << 20)
    monkeypatch.setattr(template_cost, "MAX_MADE", 1 << 23)

    def use() -> None:
        written = ChatTemplate(START + source).render(MESSAGES)
        assert "<class" not in written
        assert len(written) <= 1 << 21

    judge(use)


test_templates, test_many_templates = fuzz(_template, templates(), QUICK, 3_000)
