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

MAX_TURNS = 200_000
"""Loop turns and macro calls of one rendering; published templates take a few for each message."""
MAX_LENGTH = 1 << 24
"""Characters, or entries, of what one operator makes."""
_MAX_BITS = 1 << 12


class Compiled:
    """A template that can be rendered, with its own sandbox.

    Args:
        source: The template's text.

    Raises:
        jinja2.TemplateSyntaxError: It is not a valid template.
    """

    def __init__(self, source: str) -> None:
        environment = _Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _GenerationBlock, _Budget],
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            dict=_PlainDict(),
            namespace=_PlainNamespace,
        )
        budget = environment.extensions[_Budget.identifier]
        assert isinstance(budget, _Budget)
        self._budget = budget
        tree = environment.parse(source)
        _Meter(budget).visit(tree)
        self._template = environment.from_string(tree)

    def render(self, **variables: Any) -> str:
        """The text that the template makes of its variables."""
        self._budget.left = MAX_TURNS
        return self._template.render(**variables)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses operators whose result would not fit any conversation."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str | list | tuple):
            _check_length(len(left) + len(right) if hasattr(right, "__len__") else 0)
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                    _check_length(len(sequence) * times)
            _check_bits(left, right, lambda a, b: a.bit_length() + b.bit_length())
        elif operator == "**":
            _check_bits(left, right, lambda a, b: a.bit_length() * abs(b))
        return super().call_binop(context, operator, left, right)


def _check_length(length: int) -> None:
    if length > MAX_LENGTH:
        raise SecurityError(f"it makes a text or list of {length:,} entries")


def _check_bits(left: Any, right: Any, bits: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and bits(left, right) > _MAX_BITS:
        raise SecurityError("it makes a number of more than a thousand digits")


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's text for other trainers; here it renders it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Budget(jinja2.ext.Extension):
    """Counts what `_Meter` makes a template report."""

    left = MAX_TURNS

    def spend(self) -> bool:
        """Count one turn of a loop or one call of a macro."""
        self.left -= 1
        if self.left < 0:
            raise SecurityError(
                f"it does not come to an end: more than {MAX_TURNS:,} turns of its loops"
            )
        return True

    def concat(self, *parts: Any) -> str:
        """The operator `~`."""
        texts = [str(part) for part in parts]
        _check_length(sum(map(len, texts)))
        return "".join(texts)


class _Meter(NodeTransformer):
    """Puts a call of `spend` at the start of every loop and macro body, and checks every `~`."""

    def __init__(self, budget: _Budget) -> None:
        self._budget = budget

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, self._spend(node))
        if node.test is not None:
            # A loop that picks its entries turns for those that it leaves out as well.
            node.test = nodes.And(self._call("spend", [], node), node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, self._spend(node))
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, self._spend(node))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("concat", node.nodes, node)

    def _spend(self, node: nodes.Node) -> nodes.Node:
        return nodes.ExprStmt(self._call("spend", [], node), lineno=node.lineno)

    def _call(self, name: str, args: list[nodes.Expr], node: nodes.Node) -> nodes.Call:
        return self._budget.call_method(name, args, lineno=node.lineno)


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
