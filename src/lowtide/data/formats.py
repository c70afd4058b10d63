"""Data formats: from a JSON object to a checked record.

The first record decides the format, by its keys, and every later record must have the same keys.
A new format is a record class with a `parse` function and one line in `_formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.data.files import Problems, Tally, iter_rows
from lowtide.data.json_list import kind_of
from lowtide.data.text import EmptyDataError
from lowtide.data.tokenizer import unencodable
from lowtide.errors import DataError, listed, shown

EMPTY, MIXED = "empty", "of another format"
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class FeatureNames:
    """The keys that hold a record's parts, for data that spells them differently."""

    prompt: str = "prompt"
    completion: str = "completion"
    text: str = "text"
    chat: str = "messages"


@dataclass(frozen=True)
class ChatRecord:
    """A conversation; turns keep all their keys, for templates that use them."""

    where: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] | None = None
    """What else the template reads (`chat_template_kwargs`), such as `enable_thinking`."""


@dataclass(frozen=True)
class PromptRecord:
    """A prompt and the completion to learn."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class InstructionRecord:
    """Alpaca's three parts; `input` may be empty."""

    where: str
    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class TextRecord:
    """A text to learn as it stands."""

    where: str
    text: str


Record = ChatRecord | PromptRecord | InstructionRecord | TextRecord


class _BadRecordError(Exception):
    """What is wrong with one record, and what such problems are counted under."""

    def __init__(self, what: str, kind: str = "not as expected") -> None:
        super().__init__(what)
        self.kind = kind


@dataclass(frozen=True)
class _Format:
    name: str
    keys: tuple[str, ...]
    parse: Callable[[Mapping[str, Any], str], Record]


def _formats(names: FeatureNames) -> list[_Format]:
    """Every format; where a record fits two, the earlier one is meant."""

    def pair(prompt: str, completion: str) -> Callable[[Mapping[str, Any], str], Record]:
        return lambda row, where: PromptRecord(
            where, _filled(row, prompt), _filled(row, completion)
        )

    def chat(row: Mapping[str, Any], where: str) -> Record:
        messages = _messages(row[names.chat], names.chat)
        variables = row.get("chat_template_kwargs")
        if variables is not None and not isinstance(variables, dict):
            raise _BadRecordError(
                f"'chat_template_kwargs' is {kind_of(variables)}; expected an object"
            )
        return ChatRecord(where, messages, _tools(row.get("tools")), variables)

    return [
        _Format("chat", (names.chat,), chat),
        _Format(
            "prompt and completion",
            (names.prompt, names.completion),
            pair(names.prompt, names.completion),
        ),
        _Format("question and answer", ("question", "answer"), pair("question", "answer")),
        _Format("alpaca", ("instruction", "output"), _instruction),
        _Format(
            "text", (names.text,), lambda row, where: TextRecord(where, _filled(row, names.text))
        ),
    ]


def iter_records(
    path: Path, names: FeatureNames | None = None, problems: Problems | Tally | None = None
) -> Iterator[Record]:
    """The records of a .jsonl or .json file, each checked.

    After the first bad record nothing more is yielded: the rest is only checked, so that the
    error, which comes at the end, can name several problems at once.

    Args:
        path: The file.
        names: The keys to look for.
        problems: Takes what is wrong; None ends with an error where there is something.

    Yields:
        The records in order.

    Raises:
        DataError: A line or record cannot be used, or there are none; with each one's place, what
            was found and what was expected.
    """
    formats = _formats(names or FeatureNames())
    chosen: _Format | None = None
    problems = Problems(path) if problems is None else problems
    seen = False
    for place, row in iter_rows(path, problems):
        seen = True
        if not isinstance(row, dict):
            found = kind_of(row)
            problems.add(f"{place}: found {found}; expected an object with named parts", MIXED)
            continue
        if not row:
            problems.add(f"{place}: the record is empty", EMPTY)
            continue
        chosen = chosen or _infer(row, formats, path, place)
        missing = [key for key in chosen.keys if key not in row]
        if missing:
            problems.add(
                f"{place}: found the keys {_quoted(row)}; the first record is {chosen.name}, "
                f"so expected {_quoted(chosen.keys)}",
                MIXED,
            )
            continue
        try:
            record = chosen.parse(row, f"{path}, {place}")
        except _BadRecordError as error:
            problems.add(f"{place}: {error}", error.kind)
            continue
        if not problems:
            yield record
    problems.raise_if_any()
    if not seen:
        raise EmptyDataError(f"{path} holds no records. Expected one JSON object on each line.")


def _infer(row: Mapping[str, Any], formats: list[_Format], path: Path, place: str) -> _Format:
    for candidate in formats:
        if all(key in row for key in candidate.keys):
            return candidate
    expected = [f"{candidate.name}: {_quoted(candidate.keys)}" for candidate in formats]
    raise DataError(
        f"{path}, {place}: no known format has the keys {_quoted(row)}. Expected one of\n"
        f"{listed(expected)}\n"
        "Rename the keys, or say which they are with --chat-feature, --prompt-feature and "
        "--completion-feature, or --text-feature."
    )


def _quoted(keys: Mapping[str, Any] | tuple[str, ...]) -> str:
    return ", ".join(shown(key) for key in keys)


def _instruction(row: Mapping[str, Any], where: str) -> Record:
    extra = row.get("input")
    if extra is None:
        extra = ""
    return InstructionRecord(
        where, _filled(row, "instruction"), _string(extra, "'input'"), _filled(row, "output")
    )


def _filled(row: Mapping[str, Any], key: str) -> str:
    text = _string(row[key], repr(key))
    if not text.strip():
        raise _BadRecordError(f"{key!r} is empty", EMPTY)
    return text


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _BadRecordError(f"{name} is {kind_of(value)}; expected a string")
    problem = unencodable(value)
    if problem is not None:
        raise _BadRecordError(f"{name}: {problem}")
    return value


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _BadRecordError(f"'tools' is {kind_of(value)}; expected a list of objects")
    return value


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    """Check a conversation: every turn by itself, then their order."""
    if not isinstance(value, list):
        raise _BadRecordError(f"{name!r} is {kind_of(value)}; expected a list of messages")
    if not value:
        raise _BadRecordError(f"{name!r} is empty")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise _BadRecordError(
                f"message {number} is {kind_of(message)}; expected an object with 'role' and "
                "'content'"
            )
        _check_message(message, f"message {number}")
    _check_order([message["role"] for message in value])
    return value


def _check_message(message: Mapping[str, Any], place: str) -> None:
    missing = [key for key in ("role", "content") if key not in message]
    calls = message.get("tool_calls")
    if "role" in missing or (missing and not calls):
        raise _BadRecordError(
            f"{place} has the keys {_quoted(message) or '(none)'}; expected 'role' and 'content'"
        )
    role, content = message["role"], message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        found = shown(role) if isinstance(role, str) else kind_of(role)
        raise _BadRecordError(f"{place} has the role {found}; expected {', '.join(ROLES)}")
    if calls is not None and (role != "assistant" or not isinstance(calls, list)):
        raise _BadRecordError(f"{place}: 'tool_calls' must be a list in an assistant message")
    if content is None and calls:
        return
    text = _string(content, f"{place} ({role}): 'content'")
    if role in ("user", "assistant") and not text.strip() and not calls:
        raise _BadRecordError(f"{place} ({role}): 'content' is empty", EMPTY)


def _check_order(roles: list[str]) -> None:
    """System only first, then user, then turns that alternate; tools answer an assistant."""
    previous = ""
    for number, role in enumerate(roles, start=1):
        place = f"message {number}"
        if role == "system":
            if number > 1:
                raise _BadRecordError(
                    f"{place} is from system, which may only come first; join it to the first"
                )
        elif previous in ("", "system") and role != "user":
            raise _BadRecordError(f"{place} is from {role}; expected user to speak first")
        elif role == "tool" and previous == "user":
            raise _BadRecordError(f"{place} is from tool after user; tools answer an assistant")
        elif role == previous and role != "tool":
            raise _BadRecordError(f"{place} is a second {role} message in a row; join the two")
        previous = role
    if "assistant" not in roles:
        raise _BadRecordError("no message is from assistant, so there is nothing to learn")
