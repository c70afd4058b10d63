"""Settings, declared once: flags, YAML keys, Python keywords and the saved run.yaml.

A command's settings are a frozen dataclass whose fields are made by `setting`. From them come the
command line (`--max-seq-length`), the keys of a `--config` file (`max_seq_length`; dashes are read
as underscores), the keywords of the Python function, and the types, ranges and help.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lowtide.errors import ConfigError, listed


@dataclass(frozen=True)
class Rule:
    """What a setting may be, and how it is explained."""

    help: str
    choices: tuple[str, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None


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
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in known:
            problems.append(f"unknown setting {key!r}{did_you_mean(name, known)}")
            continue
        try:
            values[name] = _checked(name, value, hints[name], known[name].metadata["rule"])
        except ValueError as error:
            problems.append(str(error))
    for name, one in known.items():
        if name not in values and one.default is MISSING and not any(name in p for p in problems):
            problems.append(f"{flag(name)} is required: {one.metadata['rule'].help}")
    if problems:
        raise ConfigError(f"the settings cannot be used:\n{listed(problems)}")
    return kind(**values)


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
    return hint, False


def _checked(name: str, value: Any, hint: Any, rule: Rule) -> Any:
    """`value` as the field's type and within its rule; ValueError says what is wrong."""
    base, optional = _base_type(hint)
    if value is None and optional:
        return None
    if base is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:  # YAML reads 1e-4 as a string
            value = float(value)
        except ValueError:
            pass
    if base is str and isinstance(value, Path):
        value = str(value)
    if base is str and isinstance(value, list | tuple) and name == "target_modules":
        value = ",".join(map(str, value))
    if not isinstance(value, base) or (base is not bool and isinstance(value, bool)):
        raise ValueError(f"{name} = {value!r}: expected {_kind_name(base)}")
    if base is float and not math.isfinite(value):
        raise ValueError(f"{name} = {value!r}: expected a finite number")
    if rule.choices is not None and value not in rule.choices:
        raise ValueError(
            f"{name} = {value!r}: choose {', '.join(rule.choices)}"
            f"{did_you_mean(str(value), rule.choices)}"
        )
    if rule.minimum is not None and value < rule.minimum:
        raise ValueError(f"{name} = {value!r}: expected at least {rule.minimum:g}")
    if rule.maximum is not None and value > rule.maximum:
        raise ValueError(f"{name} = {value!r}: expected at most {rule.maximum:g}")
    if rule.above is not None and not value > rule.above:
        raise ValueError(f"{name} = {value!r}: expected more than {rule.above:g}")
    return value


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
            hints = [
                f"unknown argument {u!r}{did_you_mean(u.split('=')[0], flags)}" for u in unknown
            ]
            raise ConfigError(f"{listed(hints)}\nSee `{self.prog} --help`.")
        return parsed


def parser_for(kind: type, prog: str, description: str) -> Parser:
    """A command line with one flag per setting, `--config` and `--json`."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    hints = typing.get_type_hints(kind)
    for one in fields(kind):
        rule: Rule = one.metadata["rule"]
        base, _ = _base_type(hints[one.name])
        default = "required" if one.default is MISSING else f"default: {_shown(one.default)}"
        text = f"{rule.help} ({default})".replace("%", "%%")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text, "dest": one.name}
        if base is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = _converter(base)
            options["metavar"] = "|".join(rule.choices) if rule.choices else base.__name__.upper()
        parser.add_argument(flag(one.name), **options)
    parser.add_argument(
        "--config", default=None, metavar="FILE", help="YAML file of settings; flags win over it"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout, all else on stderr"
    )
    return parser


def _converter(base: type) -> Any:
    """argparse's type: what does not convert stays text, so that `build` reports it."""

    def convert(text: str) -> Any:
        try:
            return base(text)
        except ValueError:
            return text

    return convert


def _shown(default: Any) -> str:
    return "none" if default is None else str(default)


def from_command_line(kind: type[S], parsed: argparse.Namespace) -> S:
    """Settings from the `--config` file and the flags, which win.

    Raises:
        ConfigError: the file cannot be read, or `build` refuses a value.
    """
    given = dict(vars(parsed))
    given.pop("json")
    path = given.pop("config")
    from_file = read_yaml(Path(path)) if path is not None else {}
    normal = {str(key).replace("-", "_"): value for key, value in from_file.items()}
    return build(kind, {**normal, **given})


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, not YAML, or not a mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"--config {path}: there is no such file.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read as YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} holds {type(content).__name__}; expected key: value.")
    return content


def to_yaml(settings: Any) -> str:
    """The settings as YAML that `--config` reads back."""
    import yaml

    return str(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False, allow_unicode=True))
