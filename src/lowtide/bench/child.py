"""A measurement in a process of its own, which ends when we do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowtide.config import flag
from lowtide.errors import LowtideError

_PATIENCE_S = 5.0


class SkippedError(LowtideError):
    """What was to be measured is not installed here."""


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings as the flags of a lowtide command; None leaves a flag out.

    Args:
        settings: by name; `shape` says what `model` is and is no flag.

    Returns:
        The arguments.
    """
    arguments = []
    for name, value in settings.items():
        if value is None or name == "shape":
            continue
        if isinstance(value, bool):
            arguments.append(flag(name) if value else flag(f"no_{name}"))
        else:
            arguments.append(f"{flag(name)}={value}")
    return arguments


def run_child(command: Sequence[str], scratch: Path) -> dict[str, Any]:
    """Run a command in a fresh process and return the JSON document that it prints.

    Args:
        command: program and arguments.
        scratch: its TMPDIR; whatever it leaves there is the caller's to remove.

    Returns:
        The document.

    Raises:
        SkippedError: the document says so.
        LowtideError: the process failed or was killed; with the last thing it said.
    """
    environment = {**os.environ, "TMPDIR": str(scratch)}
    # Files instead of pipes: neither side ever waits for the other to read.
    with (
        tempfile.TemporaryFile(dir=scratch) as out,
        tempfile.TemporaryFile(dir=scratch) as err,
    ):
        # A session of its own: what the child started in turn is ended with it.
        child = subprocess.Popen(
            command, stdout=out, stderr=err, env=environment, start_new_session=True
        )
        try:
            code = child.wait()
        except BaseException:
            _end(child)
            raise
        said, errors = _text(out), _text(err)
    try:
        document = json.loads(said)
    except ValueError:
        document = None
    if code == 0 and isinstance(document, dict):
        return document
    told = document.get("error") if isinstance(document, dict) else None
    if isinstance(document, dict) and document.get("kind") == SkippedError.__name__:
        raise SkippedError(str(told))
    raise LowtideError(_failure(code, told, errors))


def _text(file: Any) -> str:
    file.seek(0)
    text: str = file.read().decode(errors="replace")
    return text


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and all that it started, gently first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_PATIENCE_S)
            return


def _failure(code: int, told: str | None, errors: str) -> str:
    """What is recorded of a process that gave no result."""
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "")
    said = f" Its last message: {last.strip()}" if last else " It said nothing."
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (often by the system, for want of memory)" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{hint}.{said}"
    if told:
        return told
    return f"the process stopped with exit code {code}.{said}"
