"""Where the assistant speaks in a rendered conversation, and what a template does to its turns.

Both are found by rendering and comparing, never by looking for a template's markers: whatever it
writes, the rendering with the generation prompt ends where the assistant begins. Where a template
writes earlier turns differently once others follow (thinking that is left out, an end of text
after the last turn), the turn's words are replaced by a mark, and what lies around it compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from lowtide.data.templates import ChatTemplate, Message, TemplateRefusal
from lowtide.errors import DataError

Span = tuple[int, int]
_MARK = "Qz7lowtideZq"  # letters and digits, so that no template trims it or takes it for a tag
_PROBE = {"user": "Hello", "assistant": _MARK, "system": "Qz8lowtideZq"}
_WINDOW = 400


@dataclass(frozen=True)
class Conversation:
    """One record's messages, and all else that its template is given."""

    template: ChatTemplate
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] | None = None

    def render(self, messages: Sequence[Message] | None = None, prompted: bool = False) -> str:
        """The text of all messages, or of those given."""
        turns = self.messages if messages is None else messages
        return self.template.render(turns, prompted, self.tools, self.variables)


def assistant_spans(conversation: Conversation, full: str) -> list[Span]:
    """Where in a rendered conversation the assistant speaks, end markers included.

    Args:
        conversation: What was rendered.
        full: The rendered text.

    Returns:
        One (start, end) in characters for each assistant turn.

    Raises:
        DataError: The template writes a turn in a way that cannot be found in the whole.
    """
    turns = enumerate(conversation.messages)
    return [_span(conversation, full, k) for k, turn in turns if turn["role"] == "assistant"]


def _span(conversation: Conversation, full: str, k: int) -> Span:
    messages = conversation.messages
    before = conversation.render(messages[:k], prompted=True)
    after = full
    if k + 1 < len(messages):
        after = conversation.render(messages[: k + 1])
    if not (full.startswith(before) and full.startswith(after) and len(before) < len(after)):
        return _span_by_mark(conversation, full, k, before)
    turn = full[len(before) : len(after)]
    content = (messages[k].get("content") or "").rstrip()
    marked = turn.rstrip()
    if content and marked.endswith(content):
        # No end marker: the white space itself is what ends the turn.
        marked = turn
    return len(before), len(before) + len(marked)


def _span_by_mark(conversation: Conversation, full: str, k: int, before: str) -> Span:
    """The span of turn k in a text that is no continuation of the turns before it.

    With a mark for the turn's words, the text around it is the same as in `full`, or the turn
    cannot be found. The turn begins where its text before the mark agrees longest, read backwards,
    with the rendering that asks for it; and it ends with what follows the mark whether or not
    other messages do.
    """
    messages = conversation.messages
    marked = {"role": "assistant", "content": _MARK}
    if "tool_calls" not in messages[k]:
        marked = {**messages[k], **marked}
    try:
        whole = conversation.render([*messages[:k], marked, *messages[k + 1 :]])
        alone = conversation.render([*messages[:k], marked])
    except TemplateRefusal:
        raise _cannot_mask(conversation, k) from None
    head, found, tail = whole.rpartition(_MARK)
    ending = alone.rpartition(_MARK)[2]
    start = _agreement(head, before)
    around = full.startswith(head[:start]) and full.endswith(tail)
    if not found or not around or _MARK in full:
        raise _cannot_mask(conversation, k)
    end_marker = ending[: _shared_prefix(ending, tail)]
    if k + 1 < len(messages):
        # "<|end|><|" may be shared by accident: a marker does not break off within a tag.
        end_marker = end_marker[: _whole_tags(end_marker)]
    end = len(full) - len(tail) + len(end_marker.rstrip() or end_marker)
    if end <= start:
        raise _cannot_mask(conversation, k)
    return start, end


def _agreement(head: str, before: str) -> int:
    """The end of the part of `head` that agrees with the end of `before` for longest."""
    wanted = before[-_WINDOW:][::-1]
    best, length = len(head), 0
    for end in range(len(head), max(0, len(head) - _WINDOW), -1):
        agreed = _shared_prefix(head[max(0, end - _WINDOW) : end][::-1], wanted)
        if agreed > length:
            best, length = end, agreed
        if length == len(wanted):
            break
    return best


def _shared_prefix(a: str, b: str) -> int:
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return sum(1 for _ in pairs)


def _whole_tags(text: str) -> int:
    opened = max(text.rfind("<"), text.rfind("["))
    closed = max(text.rfind(">"), text.rfind("]"))
    return opened if opened > closed else len(text)


def _cannot_mask(conversation: Conversation, k: int) -> DataError:
    return DataError(
        f"prompts cannot be masked: {conversation.template.origin} writes message {k + 1} "
        "differently when other messages follow it. Train without --mask-prompt, pass a simpler "
        "template with --chat-template FILE, or split the conversation so that each record ends "
        "with its only assistant message."
    )


@dataclass(frozen=True)
class TemplateTraits:
    """What a chat template does that a user of it has to know, found by trying it."""

    refuses: str | None
    """Its own words, where it refuses even a question and an answer."""
    writes_bos: bool
    system: str
    """`takes`, `refuses` or `leaves out` a system message."""
    alternates: bool
    """It refuses two user messages in a row."""
    end_of_turn: str
    """What it writes after an assistant's words, without white space around it."""
    dated: bool
    """It writes today's date, so that the same record has another text tomorrow."""

    def words(self) -> str:
        """The traits as one line for people."""
        if self.refuses is not None:
            return f"refuses a plain question and answer: {self.refuses}"
        system = {
            "takes": "takes a system message",
            "refuses": "refuses a system message",
            "leaves out": "leaves out a system message",
        }[self.system]
        said = [
            "writes BOS" if self.writes_bos else "writes no BOS",
            system,
            "insists that user and assistant take turns"
            if self.alternates
            else "takes roles in any order",
            f"ends a turn with {self.end_of_turn}" if self.end_of_turn else "marks no end of turn",
        ]
        return ", ".join([*said, "writes today's date"] if self.dated else said)


def template_traits(template: ChatTemplate) -> TemplateTraits:
    """Try a chat template on a few small conversations.

    Args:
        template: The template.

    Returns:
        What it does.

    Raises:
        DataError: It cannot be parsed.
    """

    def attempt(*roles: str) -> str | TemplateRefusal:
        try:
            return template.render([{"role": role, "content": _PROBE[role]} for role in roles])
        except TemplateRefusal as refusal:
            return refusal

    plain = attempt("user", "assistant")
    if isinstance(plain, TemplateRefusal):
        return TemplateTraits(plain.said, False, "refuses", False, "", False)
    bos = template.special_tokens.get("bos_token")
    with_system = attempt("system", "user", "assistant")
    system = "takes"
    if isinstance(with_system, TemplateRefusal):
        system = "refuses"
    elif _PROBE["system"] not in with_system:
        system = "leaves out"
    longer = attempt("user", "assistant", "user", "assistant")
    ending = plain.rpartition(_MARK)[2]
    if isinstance(longer, str):
        tail = longer.partition(_MARK)[2]
        shared = ending[: _shared_prefix(ending, tail)]
        ending = shared[: _whole_tags(shared)]
    return TemplateTraits(
        refuses=None,
        writes_bos=bool(bos) and plain.startswith(str(bos)),
        system=system,
        alternates=isinstance(attempt("user", "user", "assistant"), TemplateRefusal),
        end_of_turn=ending.strip(),
        dated="strftime_now" in template.source,
    )


def refusal_remedy(conversation: Conversation) -> str:
    """What to do about a template that refuses a conversation, found by trying others.

    Args:
        conversation: What it refused.

    Returns:
        A sentence or two.
    """
    another = "pass another template with --chat-template FILE."
    roles = [message["role"] for message in conversation.messages]
    traits = template_traits(conversation.template)
    if traits.refuses is not None:
        return f"It refuses even a plain question and answer; {another}"
    if "system" in roles and traits.system == "refuses":
        return (
            "It takes no system message: put that text at the start of the first user message, "
            f"or {another}"
        )
    if "tool" in roles or any("tool_calls" in message for message in conversation.messages):
        return f"It may not be made for tools; leave such records out, or {another}"
    if traits.alternates:
        return (
            "It wants user and assistant to take turns, user first: join messages of one role "
            f"that follow each other, or {another}"
        )
    return f"Change the record, or {another}"
