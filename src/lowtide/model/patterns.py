"""Which key of a pattern stands for a module, as PEFT decides it: by regular expressions.

An adapter's files are other people's, and some expressions take longer than the world will last.
Names are matched here; anything that can repeat or branch goes to a process of its own, which may
take a second of CPU and little memory for all of them together.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache

from lowtide.errors import ConfigError

_PLAIN = re.compile(r"[\w.-]+")
MOST_CHARACTERS = 500
"""Of a key."""
_CPU_S, _BYTES = 1, 512 << 20
CHILD = f"""
import json, re, resource, sys, warnings
warnings.simplefilter("ignore")
resource.setrlimit(resource.RLIMIT_CPU, ({_CPU_S}, {_CPU_S}))
resource.setrlimit(resource.RLIMIT_AS, ({_BYTES}, {_BYTES}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
given = json.load(sys.stdin)
for number, (expression, paths) in enumerate(given):
    print(number, flush=True)
    found = re.compile(expression)
    print(json.dumps([path for path in paths if found.match(path)]))
print("done")
"""
"""What the process runs: expressions and names from stdin, and the names that match to stdout."""


def expression(key: str) -> str:
    """PEFT's: the end of a module's name, from a dot on, or all of it."""
    return rf"(.*\.)?({key})$"


def first_match(keys: tuple[str, ...], path: str) -> str | None:
    """The first key that PEFT would match with a module's name.

    Args:
        keys: in their order.
        path: the name.

    Returns:
        The key, or None.

    Raises:
        ConfigError: a key takes too long to match.
    """
    match_all(keys, (path,))
    return _known(keys)[path]


def match_all(keys: tuple[str, ...], paths: Iterable[str]) -> None:
    """Find the first key of each of these names at once: one process does for all.

    Args:
        keys: in their order.
        paths: names.

    Raises:
        ConfigError: a key takes too long to match.
    """
    known = _known(keys)
    wanted = [path for path in paths if path not in known]
    if not wanted:
        return
    matched = dict(zip(keys, _matched(keys, wanted), strict=True))
    for path in wanted:
        known[path] = next((key for key in keys if path in matched[key]), None)


@lru_cache(maxsize=64)
def _known(keys: tuple[str, ...]) -> dict[str, str | None]:
    """What was found so far."""
    return {}


def _matched(keys: Sequence[str], paths: list[str]) -> list[set[str]]:
    """The names that each key matches."""
    found: list[set[str]] = []
    others = [key for key in keys if not _PLAIN.fullmatch(key)]
    answers = iter(_asked(others, paths) if others else ())
    for key in keys:
        if _PLAIN.fullmatch(key):
            plain = re.compile(expression(key))
            found.append({path for path in paths if plain.match(path)})
        else:
            found.append(set(next(answers)))
    return found


def _asked(keys: list[str], paths: list[str]) -> list[list[str]]:
    """The same of expressions, by a process with limits."""
    given = json.dumps([(expression(key), paths) for key in keys])
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", CHILD],
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines[-1] == "done":
        return [json.loads(line) for line in lines[1:-1:2]]
    guilty = keys[min(len(lines) // 2, len(keys) - 1)]  # two lines for each before it
    raise ConfigError(
        f"the pattern {guilty!r} takes too long, or too much memory, to compare with names such as "
        f"{paths[0]!r}. Name the modules, or take an expression without repeats of repeats."
    )
