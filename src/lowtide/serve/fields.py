"""The fields of a JSON object that a client sent: taken one by one, the rest refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from lowtide.config import did_you_mean
from lowtide.errors import shown

from .faults import Fault

T = TypeVar("T")


class Fields:
    """Takes fields out of an object, and keeps what is wrong with them until `end`.

    A field that is null counts as not given, as in OpenAI's API.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        """Nothing is taken yet."""
        self._left = {key: value for key, value in document.items() if value is not None}
        self._taken: list[str] = []
        self._problems: list[tuple[str, str]] = []

    def wrong(self, name: str, problem: str) -> None:
        """Keep a problem."""
        self._problems.append((name, problem))

    def take(self, name: str, check: Callable[[Any], T], required: bool = False) -> T | None:
        """A field's value.

        Args:
            name: the field's.
            check: makes of the value what is wanted; its ValueError goes on after the name.
            required: whether it must be there.

        Returns:
            The value; None where there is none, or a wrong one.
        """
        self._taken.append(name)
        if name not in self._left:
            if required:
                self.wrong(name, f"{name} is missing")
            return None
        try:
            return check(self._left.pop(name))
        except ValueError as error:
            said = str(error)
            self.wrong(name, f"{name}{'' if said.startswith('[') else ' '}{said}")
            return None

    def text(self, name: str, required: bool = False) -> str:
        """A text that is not empty; empty where there is none."""

        def check(value: Any) -> str:
            if not isinstance(value, str) or not value:
                raise ValueError(f"is {shown(value)}; expected text")
            return value

        return self.take(name, check, required) or ""

    def flag(self, name: str) -> bool:
        """True or false; false where there is none."""

        def check(value: Any) -> bool:
            if not isinstance(value, bool):
                raise ValueError(f"is {shown(value)}; expected true or false")
            return value

        return bool(self.take(name, check))

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number of a range."""

        def check(value: Any) -> float:
            fits = isinstance(value, int | float) and not isinstance(value, bool)
            if not fits or not low <= value <= high or not math.isfinite(value):
                raise ValueError(f"is {shown(value)}; expected a number from {low:g} to {high:g}")
            return float(value)

        value = self.take(name, check)
        return default if value is None else value

    def whole(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """A whole number of a range."""

        def check(value: Any) -> int:
            if type(value) is not int or not low <= value <= high:
                raise ValueError(
                    f"is {shown(value)}; expected a whole number from {low:,} to {high:,}"
                )
            return value

        value = self.take(name, check)
        return default if value is None else value

    def end(self, refused: Mapping[str, Collection[Any]], harmless: Collection[str]) -> None:
        """Refuse what was not taken, and what was wrong.

        Args:
            refused: parameters that are not supported, and values of theirs that ask for nothing.
            harmless: parameters that may say what they like.

        Raises:
            Fault: names all of it.
        """
        for name, value in self._left.items():
            if name in refused:
                if not any(type(value) is type(one) and value == one for one in refused[name]):
                    self.wrong(name, f"{name} = {shown(value)} is not supported; leave it out")
            elif name not in harmless:
                known = did_you_mean(name, self._taken)
                self.wrong(name, f"{shown(name)} is not a parameter that is known here{known}")
        if self._problems:
            told = "; ".join(problem for _, problem in self._problems[:10])
            raise Fault(400, f"the request cannot be used: {told}.", param=self._problems[0][0])
