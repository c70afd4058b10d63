"""The few kinds of error that lowtide raises for a user's mistake.

Every message says what was found, what was expected and what to do. The command line prints
the message without a traceback and exits with `exit_code`; from Python they are ordinary
exceptions. Anything else that escapes is a bug in lowtide.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

_MOST_CHARACTERS = 8_000
MOST_CONFIG_BYTES = 16 << 20
"""Of a config.json or adapter_config.json: a larger one is not read into memory."""


class LowtideError(Exception):
    """Base of all errors with a remedy. Exit code 1: the work itself failed."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        """Keep the message; of one that quotes something endless, its beginning and its end."""
        if len(message) > _MOST_CHARACTERS:
            half = _MOST_CHARACTERS // 2
            left = len(message) - 2 * half
            message = f"{message[:half]} [{left:,} characters left out] {message[-half:]}"
        super().__init__(message)

    @property
    def kind(self) -> str:
        """The class name, which child processes send back to their parent."""
        return type(self).__name__


class InputError(LowtideError):
    """The command, a setting or a file given to it is wrong. Exit code 2."""

    exit_code = 2


class ConfigError(InputError):
    """A setting (flag, YAML key, keyword) is unknown or out of range."""


class ModelError(InputError):
    """A model directory, its config.json or its weights cannot be used."""


class DataError(InputError):
    """A data file or a record in it cannot be used."""


class AdapterError(InputError):
    """An adapter does not fit the model, or its files cannot be used."""


class OutputError(InputError):
    """The output directory cannot be written, or already holds something."""


class TrainingError(LowtideError):
    """Training had to stop: a loss or gradient that is not finite, a disk that filled."""


class BudgetError(TrainingError):
    """An update would take, or took, more memory than the budget, or than is free."""


class LowtideWarning(UserWarning):
    """Something works, but not as well as it looks; the command line prints it in one line."""


KINDS: dict[str, type[LowtideError]] = {
    kind.__name__: kind
    for kind in (
        LowtideError,
        InputError,
        ConfigError,
        ModelError,
        DataError,
        AdapterError,
        OutputError,
        TrainingError,
        BudgetError,
    )
}


def listed(problems: Sequence[str], limit: int = 20) -> str:
    """Several problems as one indented list, so that a user mends them in one go."""
    shown = [f"  - {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        shown.append(f"  ... and {len(problems) - limit} more")
    return "\n".join(shown)


_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxdict, _SHOWN.maxlist, _SHOWN.maxtuple = 3, 6, 8, 8
_SHOWN.maxstring, _SHOWN.maxlong, _SHOWN.maxother = 200, 60, 200


def shown(value: Any) -> str:
    """A value that a user gave, as a message shows it: whole where that fits a line or two."""
    return _SHOWN.repr(value)
