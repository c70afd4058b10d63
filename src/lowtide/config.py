"""Settings, declared once: flags, YAML keys, Python keywords and the saved run.yaml.

A command's settings are a frozen dataclass whose fields are made by `setting`. From them come the
command line (`--max-seq-length`), the keys of a `--config` file (`max_seq_length`; dashes are read
as underscores), the keywords of the Python function, and the types, ranges and help.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lowtide.elsewhere import ELSEWHERE
from lowtide.errors import ConfigError, listed, shown
from lowtide.settings_file import read_yaml


@dataclass(frozen=True)
class Rule:
    """What a setting may be, and how it is explained."""

    help: str
    choices: tuple[str, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    filled: bool = False
    """Text must not be empty."""
    listed: bool = False
    """Text that may come as a list, which is joined by commas."""
    mapped: bool = False
    """Text that may come as a mapping, which becomes `key=value` pairs joined by commas."""
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    """What other programs call a choice -> what to give here; used in suggestions only."""
    metavar: str | None = None
    """What `--help` shows for the value, where the type does not say."""
    changeable: bool = False
    """Whether a resumed run may have another value and still be the same run."""


def setting(default: Any = MISSING, **rule: Any) -> Any:
    """A dataclass field with a `Rule`; without a default it is required."""
    metadata = {"rule": Rule(**rule)}
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


S = TypeVar("S")


def build(kind: type[S], given: Mapping[str, Any]) -> S:
    """An instance of the settings dataclass `kind` from untrusted values.

    Args:
        kind: a dataclass whose fields were made by `setting`.
        given: values by field name, or by flag name with dashes.

    Returns:
        The settings, with every value of its field's type and within its range.

    Raises:
        ConfigError: names every unknown, missing, wrongly typed and out-of-range setting.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]  # kind is a dataclass
    values: dict[str, Any] = {}
    problems: list[str] = []
    seen = set()
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in known:
            problems.append(f"unknown setting {shown(key)}{_setting_meant(name, known)}")
            continue
        seen.add(name)
        try:
            values[name] = _checked(name, value, hints[name], known[name].metadata["rule"])
        except ValueError as error:
            problems.append(str(error))
    for name, one in known.items():
        if name not in seen and one.default is MISSING:
            problems.append(f"{flag(name)} is required: {one.metadata['rule'].help}")
    if problems:
        raise ConfigError(f"the settings cannot be used:\n{listed(problems)}")
    return kind(**values)


def _setting_meant(name: str, known: Mapping[str, Any]) -> str:
    usual = ELSEWHERE.get(name)
    if usual is not None and usual in known:
        return f"; did you mean {usual!r}?"
    return did_you_mean(name, known)


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """A suggestion in parentheses' stead, or nothing."""
    near = get_close_matches(name, list(known), 1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def flag(name: str) -> str:
    """`max_seq_length` -> `--max-seq-length`."""
    return "--" + name.replace("_", "-")


def _base_type(hint: Any) -> tuple[type, bool]:
    """The plain type of a field and whether None is allowed."""
    if isinstance(hint, types.UnionType):
        plain = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return plain[0], len(plain) < len(typing.get_args(hint))
    return typing.get_origin(hint) or hint, False


def _checked(name: str, value: Any, hint: Any, rule: Rule) -> Any:
    """`value` as the field's type and within its rule; ValueError says what is wrong."""
    base, optional = _base_type(hint)
    if value is None and optional:
        return None
    if base is tuple:
        return _texts(name, value, rule)
    value = _converted(value, base, rule)
    if not isinstance(value, base) or (base is not bool and isinstance(value, bool)):
        raise ValueError(f"{name} = {shown(value)}: expected {_kind_name(base)}")
    if isinstance(value, str):
        _check_text(name, value, rule)
    elif isinstance(value, int | float):
        _check_range(name, value, rule)
    return value


def _converted(value: Any, base: type, rule: Rule) -> Any:
    """Other spellings of a type; what has none comes back as it is."""
    if base is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:  # YAML reads 1e-4 as a string
            return float(value)
        except (ValueError, OverflowError):
            return value
    if base is str and isinstance(value, Path):
        return str(value)
    if base is str and rule.listed and isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if base is str and rule.mapped and isinstance(value, Mapping):
        return ",".join(f"{key}={one}" for key, one in value.items())
    return value


def _texts(name: str, value: Any, rule: Rule) -> tuple[str, ...]:
    """Several texts, of which one may stand alone."""
    values = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(one, str) for one in values):
        raise ValueError(f"{name} = {shown(value)}: expected text, or a list of texts")
    for one in values:
        _check_text(name, one, rule)
    return tuple(values)


def _check_text(name: str, value: str, rule: Rule) -> None:
    if "\0" in value:
        raise ValueError(f"{name} = {shown(value)}: expected text without NUL characters")
    if rule.filled and not value.strip():
        raise ValueError(f"{name} is empty; expected: {rule.help}")
    if rule.choices is not None and value not in rule.choices:
        usual = rule.elsewhere.get(value)
        meant = f"; here it is {usual}" if usual else did_you_mean(value, rule.choices)
        raise ValueError(f"{name} = {shown(value)}: choose {', '.join(rule.choices)}{meant}")


def _check_range(name: str, value: float, rule: Rule) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} = {value!r}: expected a finite number")
    if rule.minimum is not None and value < rule.minimum:
        raise ValueError(f"{name} = {value!r}: expected at least {rule.minimum}")
    if rule.maximum is not None and value > rule.maximum:
        raise ValueError(f"{name} = {value!r}: expected at most {rule.maximum}")
    if rule.above is not None and not value > rule.above:
        raise ValueError(f"{name} = {value!r}: expected more than {rule.above}")


def _kind_name(base: type) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[base]


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours, with a suggestion for a misspelt flag."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and exiting."""
        raise ConfigError(f"{message}. See `{self.prog} --help`.")

    def parse_strictly(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse, and name unknown flags with what they might have meant."""
        parsed, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [o for action in self._actions for o in action.option_strings]
            found = [u for u in unknown if u.startswith("-")] or unknown  # without their values
            hints = [f"unknown argument {u!r}{_flag_meant(u, flags)}" for u in found]
            raise ConfigError(
                f"the command line cannot be used:\n{listed(hints)}\nSee `{self.prog} --help`."
            )
        return parsed


def _flag_meant(argument: str, flags: Sequence[str]) -> str:
    """What an unknown argument might have been; a bare word is never a misspelt flag."""
    if not argument.startswith("-"):
        return "; a setting is given as --name value"
    name = argument.split("=")[0]
    usual = ELSEWHERE.get(name.strip("-").replace("-", "_"))
    if usual is not None and flag(usual) in flags:
        return f"; did you mean {flag(usual)!r}?"
    return did_you_mean(name, flags)


def parser_for(kind: type, prog: str, description: str) -> Parser:
    """A command line with one flag per setting, `--config` and `--json`."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    hints = typing.get_type_hints(kind)
    required = parser.add_argument_group("required")
    groups = {owner: parser.add_argument_group(title) for owner, title in _groups(kind).items()}
    usage = []
    for one in fields(kind):
        rule: Rule = one.metadata["rule"]
        base, _ = _base_type(hints[one.name])
        text = rule.help
        if one.default is not MISSING:
            text += f" (default: {_shown(one.default)})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": one.name}
        options["help"] = text.replace("%", "%%")
        if base is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif base is tuple:
            options |= {"action": "append", "metavar": "TEXT"}
        else:
            options["type"] = _converter(base)
            options["metavar"] = _metavar(base, rule)
        if one.default is MISSING:
            usage.append(f"{flag(one.name)} {options['metavar']}")
            required.add_argument(flag(one.name), **options)
        else:
            groups[_owner(kind, one.name)].add_argument(flag(one.name), **options)
    parser.usage = " ".join([prog, *usage, "[flags]"])
    parser.add_argument(
        "--config", default=None, metavar="FILE", help="YAML file of settings; flags win over it"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout, all else on stderr"
    )
    return parser


def _groups(kind: type) -> dict[type, str]:
    """The classes that settings are declared in, the command's own first, and their headings."""
    bases = [c for c in reversed(kind.__mro__[1:]) if dataclasses.is_dataclass(c)]
    titles = {base: (base.__doc__ or "").split(".")[0].lower() for base in bases}
    return {kind: "this command", **titles}


def _owner(kind: type, name: str) -> type:
    return next(c for c in kind.__mro__ if name in inspect.get_annotations(c))


def _metavar(base: type, rule: Rule) -> str:
    if rule.metavar:
        return rule.metavar
    if rule.choices:
        return "|".join(rule.choices)
    if rule.listed:
        return "LIST"
    if rule.mapped:
        return "KEY=VALUE,..."
    return "PATH" if rule.filled else {int: "N", float: "X"}.get(base, "TEXT")


def _converter(base: type) -> Any:
    """argparse's type: what does not convert stays text, so that `build` reports it."""

    def convert(text: str) -> Any:
        try:
            return base(text)
        except (ValueError, OverflowError):
            return text

    return convert


def _shown(default: Any) -> str:
    if default == ():
        return "none"
    words = {None: "none", True: "yes", False: "no"}
    return words[default] if default is None or isinstance(default, bool) else str(default)


def given_values(parsed: argparse.Namespace) -> dict[str, Any]:
    """What the `--config` file and the flags, which win, say; defaults are not among them.

    Args:
        parsed: what the parser of `parser_for` returned.

    Returns:
        Values by field name.

    Raises:
        ConfigError: the file cannot be read.
    """
    given = dict(vars(parsed))
    given.pop("json")
    path = given.pop("config")
    from_file = read_yaml(Path(path)) if path is not None else {}
    normal = {str(key).replace("-", "_"): value for key, value in from_file.items()}
    return {**normal, **given}
