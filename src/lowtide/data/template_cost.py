"""What a chat template may spend in one rendering: turns, text it writes, things it makes.

Each check is made before the work is done, from the sizes of what goes in: a text of ten thousand
gigabytes is refused, not made. `sandbox.py` says where the checks are called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

MAX_TURNS = 200_000
"""Loop turns and macro calls of one rendering; published templates take a few for each message."""
MAX_LENGTH = 1 << 24
"""Characters, or entries, of what one operation makes, and of the whole text."""
MAX_MADE = 1 << 29
"""Characters and entries of all that a rendering makes on its way. Going through what is there
counts as well: each entry of a list as 16, each character as a 64th, each filter as 64."""
_MAX_BITS = 1 << 12
_CALL, _ENTRY, _CHARACTERS = 64, 16, 64
_NUMBER = re.compile(r"\d+")
_NESTED_FIELD = re.compile(r"\{[^{}]*\{")
_READERS = frozenset(
    """
    abs batch dictsort float groupby int items list map max min random reject rejectattr reverse
    round select selectattr slice sort sum unique
    """.split()
)
"""Filters that go through their value as it is; those that are not named make a text of it."""
_POINTERS = frozenset({"attr", "count", "d", "default", "first", "last", "length"})
"""Filters that look at a value once."""


class Ledger:
    """Counts what one rendering has spent."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin another rendering."""
        self._turns, self._written, self._made = MAX_TURNS, 0, 0

    def spend(self, written: int = 0) -> bool:
        """Count one turn of a loop or one call of a macro, whose body writes that much itself."""
        self._turns -= 1
        if self._turns < 0:
            raise SecurityError(
                f"it does not come to an end: more than {MAX_TURNS:,} turns of its loops"
            )
        self._write(written)
        return True

    def finalize(self, value: Any) -> Any:
        """Count a value that is about to be written; it is jinja2's hook of that name."""
        self._write(self.weigh(value))
        return value

    def _write(self, length: int) -> None:
        self._written += length
        if self._written > MAX_LENGTH:
            raise SecurityError(f"it makes a text of more than {MAX_LENGTH:,} characters")

    def make(self, length: int) -> None:
        """Count what an operation is about to make."""
        if length > MAX_LENGTH:
            raise SecurityError(f"it makes a text or list of {length:,} entries")
        self._work(length)

    def _work(self, amount: int) -> None:
        self._made += amount
        if self._made > MAX_MADE:
            raise SecurityError(f"it makes texts and lists of more than {MAX_MADE:,} entries")

    def read(self, value: Any) -> None:
        """Count a value that an operation goes through."""
        if isinstance(value, str):
            self._work(len(value) // _CHARACTERS)
        elif isinstance(value, list | tuple | dict | range):
            self._work(len(value) * _ENTRY)

    def weigh(self, value: Any, indent: int = 0) -> int:
        """About how long a value is as text, with lists that it holds several times counted so."""
        if isinstance(value, str):
            return len(value)
        total, entries, rest = 0, 0, [(value, 1)]
        while rest:
            one, depth = rest.pop()
            entries += 1
            total += 2 + indent * depth
            if isinstance(one, Namespace):
                one = one._Namespace__attrs
            if isinstance(one, str):
                total += len(one)
            elif isinstance(one, Mapping):
                rest += [(part, depth + 1) for pair in one.items() for part in pair]
            elif isinstance(one, list | tuple):
                rest += [(part, depth + 1) for part in one]
            if total > MAX_LENGTH or len(rest) > MAX_LENGTH or depth > 1000:
                raise SecurityError(f"it makes a text of more than {MAX_LENGTH:,} characters")
        self._work(entries * _ENTRY)
        return total

    def concat(self, *parts: Any) -> str:
        """The operator `~`."""
        self.make(sum(self.weigh(part) for part in parts))
        return "".join(map(str, parts))

    def operator(self, operator: str, left: Any, right: Any) -> None:
        """Check one of `+`, `*`, `**` and `%`."""
        if operator == "+" and isinstance(left, str | list | tuple):
            self.make(len(left) + (len(right) if hasattr(right, "__len__") else 0))
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                    self.make(len(sequence) * max(times, 0))
            _check_bits(left, right, lambda a, b: a.bit_length() + b.bit_length())
        elif operator == "**":
            _check_bits(left, right, lambda a, b: a.bit_length() * abs(b))
        elif operator == "%" and isinstance(left, str):
            self.formatted(left, (right,))

    def formatted(self, text: str, arguments: tuple[Any, ...]) -> None:
        """Check what `%` or `format` makes: widths, and arguments as often as there are fields."""
        widths = sum(min(int(found[:9]), MAX_LENGTH + 1) for found in _NUMBER.findall(text))
        if _NESTED_FIELD.search(text) or "*" in text:
            values = [one for each in arguments for one in _flat(each)]
            widths += sum(abs(one) for one in values if isinstance(one, int))
        fields = max(1, text.count("%"), text.count("{"))
        self.make(len(text) + widths * fields + fields * sum(map(self.weigh, arguments)))

    def method(self, text: str, name: str, arguments: tuple[Any, ...]) -> None:
        """Check a call of a text's method."""
        self.read(text)
        for one in arguments:
            if isinstance(one, int):  # a width
                self.make(abs(one) * (1 + text.count("\t") if name == "expandtabs" else 1))
        if name == "replace" and len(arguments) > 1:
            self.replaced(text, *arguments[:2])
        elif name == "join" and arguments:
            self.joined(arguments[0], text)
        elif name == "translate" and arguments and isinstance(arguments[0], dict):
            self.make(len(text) * max(map(self.weigh, arguments[0].values()), default=1))

    def replaced(self, text: str, old: Any, new: Any) -> None:
        """Check `replace`."""
        old, new = str(old), str(new)
        self.make(len(text) + text.count(old) * len(new))

    def joined(self, values: Any, between: str) -> None:
        """Check `join` of a list; what is no list is turned into one by `filter`."""
        if isinstance(values, str):
            self.make(len(values) * (1 + len(between)))
        elif isinstance(values, list | tuple | Mapping):
            self.make(self.weigh(list(values)) + len(values) * len(between))

    def filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is checked before it is applied, and its result after."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def checked(*arguments: Any, **named: Any) -> Any:
            value, rest = arguments[first], (*arguments[first + 1 :], *named.values())
            if name == "join" and not isinstance(value, str | list | tuple | Mapping):
                value = list(value)
                arguments = (*arguments[:first], value, *arguments[first + 1 :])
            self._before(name, value, rest)
            result = function(*arguments, **named)
            if name not in _POINTERS and isinstance(result, str | list | tuple | dict):
                self.make(len(result))
            return result

        return checked

    def _before(self, name: str, value: Any, rest: tuple[Any, ...]) -> None:
        texts = [one for one in rest if isinstance(one, str)]
        sizes = [abs(one) for one in rest if isinstance(one, int)]
        self._work(_CALL)
        if name in _POINTERS:
            return
        self.read(value)
        self.make(max(sizes, default=0))
        if name == "join":
            self.joined(value, max(texts, key=len, default=""))
        elif name == "tojson":
            self.make(self.weigh(value, max(sizes, default=0)))
        elif name == "sum" and any(not isinstance(one, str | int | float) for one in rest):
            raise SecurityError("it sums what are no numbers")
        elif name not in _READERS:
            length = self.weigh(value)
            if name == "replace" and len(rest) > 1:
                self.replaced(str(value), *rest[:2])
            elif name == "format":
                self.formatted(str(value), rest)
            elif name == "indent":
                lines = str(value).count("\n") + 1
                self.make(length + lines * sum([*sizes, *map(len, texts)]))
            else:
                self.make(length * (1 + max(map(len, texts), default=0)))


def _flat(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]


def _check_bits(left: Any, right: Any, bits: Callable[[int, int], int]) -> None:
    if isinstance(left, int) and isinstance(right, int) and bits(left, right) > _MAX_BITS:
        raise SecurityError("it makes a number of more than a thousand digits")
