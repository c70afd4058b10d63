"""Where chat templates run: jinja2's immutable sandbox, with a bound on what they may spend.

A template is somebody else's program that came with a model. The sandbox keeps it from everything
but its messages; it does not keep it from running on without end. So each turn of a loop and each
call of a macro counts, and the strings and numbers that it makes may only grow so far. Counts, not
seconds: the same template on the same record ends in the same way on every machine.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .template_cost import Ledger


class Compiled:
    """A template that can be rendered, with its own sandbox.

    Args:
        source: The template's text.

    Raises:
        jinja2.TemplateSyntaxError: It is not a valid template.
    """

    def __init__(self, source: str) -> None:
        ledger = self._ledger = Ledger()
        environment = _Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _GenerationBlock, _Calls],
            finalize=ledger.finalize,
        )
        environment.ledger = ledger
        filters = {**environment.filters, "tojson": _tojson}
        environment.filters.update((name, ledger.filter(name, f)) for name, f in filters.items())
        del environment.globals["lipsum"]
        environment.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            dict=_PlainDict(),
            namespace=_PlainNamespace,
        )
        calls = environment.extensions[_Calls.identifier]
        assert isinstance(calls, _Calls)
        calls.ledger = ledger
        tree = environment.parse(source)
        _Meter(calls).visit(tree)
        self._template = environment.from_string(tree)

    def render(self, **variables: Any) -> str:
        """The text that the template makes of its variables."""
        self._ledger.start()
        return self._template.render(**variables)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Asks the ledger before an operator or a method of a text does its work."""

    ledger: Ledger
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.ledger.operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            arguments = (*args, *kwargs.values())
            self.ledger.method(owner, function.__name__, arguments)
        return super().call(context, function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped, text = super().wrap_str_format(value), getattr(value, "__self__", None)
        if wrapped is None or not isinstance(text, str):
            return wrapped

        def checked(*args: Any, **kwargs: Any) -> str:
            self.ledger.formatted(text, (*args, *kwargs.values()))
            return str(wrapped(*args, **kwargs))

        return checked


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's text for other trainers; here it renders it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Calls(jinja2.ext.Extension):
    """What `_Meter` makes a template call."""

    ledger: Ledger

    def spend(self, written: int) -> bool:
        """Count one turn of a loop or one call of a macro."""
        return self.ledger.spend(written)

    def concat(self, *parts: Any) -> str:
        """The operator `~`."""
        return self.ledger.concat(*parts)


class _Meter(NodeTransformer):
    """Puts a call of `spend` at the start of every loop and macro body, and checks every `~`."""

    def __init__(self, calls: _Calls) -> None:
        self._calls = calls

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._metered(node)
        if node.test is not None:
            # A loop that picks its entries turns for those that it leaves out as well.
            turn = self._call("spend", [nodes.Const(0)], node)
            node.test = nodes.And(turn, node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._metered(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._metered(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("concat", node.nodes, node)

    def _metered(self, node: Any) -> nodes.Node:
        written = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        call = self._call("spend", [nodes.Const(written)], node)
        node.body.insert(0, nodes.ExprStmt(call, lineno=node.lineno))
        return node  # type: ignore[no-any-return]

    def _call(self, name: str, args: list[nodes.Expr], node: nodes.Node) -> nodes.Call:
        return self._calls.call_method(name, args, lineno=node.lineno)


class _PlainDict:
    """`dict` as a function, with nothing of the class to reach through it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


class _PlainNamespace(Namespace):
    """`namespace` that stores no names with a leading underscore, as Hugging Face has it."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]  # a template may call a value "self"
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores {name!r} in a namespace; no underscore may lead there")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, >, & and ', which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
