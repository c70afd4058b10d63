"""`lowtide chat`."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from lowtide.config import setting
from lowtide.data.tokenizer import Tokenizer
from lowtide.errors import DataError
from lowtide.infer.answer import LENGTH, Answerer, Wanted
from lowtide.infer.generate import Sampling
from lowtide.model.adapter import Adapter
from lowtide.train.settings import MAX_SEED

from .output import Output, settings_of
from .speaking import ContextSettings

_HELP = """\
/reset           forget the conversation
/system TEXT     set the system prompt, and forget the conversation; without TEXT none
/adapter on|off  answer with the adapter, or as the base model does
/help            this list
/quit            end (so does Ctrl-D); Ctrl-C stops an answer"""


@dataclass(frozen=True, kw_only=True)
class ChatSettings(ContextSettings):
    """Settings of `lowtide chat`."""

    adapter_path: str | None = setting(None, help="PEFT adapter directory to apply", filled=True)
    system: str | None = setting(None, help="system prompt to begin with", filled=True)
    seed: int = setting(0, help="seed of sampling", minimum=0, maximum=MAX_SEED)


def run(argv: Sequence[str]) -> int:
    """Talk until the input ends."""
    settings, output = settings_of(
        ChatSettings, "chat", "Talk with a model, with or without an adapter.", argv
    )
    model, tokenizer = settings.opened()
    if tokenizer.template is None:
        raise DataError(
            "the model has no chat template, so a conversation cannot be written as the text that "
            "it reads. Pass one with --chat-template FILE (Jinja), or use `lowtide generate`."
        )
    adapter = None
    if settings.adapter_path is not None:
        adapter = Adapter.load(Path(settings.adapter_path).expanduser(), model)
    answerer = Answerer(model, tokenizer, settings.context)
    chat = Chat(answerer, adapter, settings, output)
    interactive = sys.stdin.isatty() and not output.as_json
    if interactive:
        output.say("Ctrl-C stops an answer, Ctrl-D ends, /help lists the rest.")
    for line in _lines(interactive):
        if not chat.take(line):
            break
    output.result({"turns": chat.turns})
    return 0


def _lines(interactive: bool) -> Iterator[str]:
    """What the user types, or what a pipe brings, line by line."""
    if not interactive:
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited, and brought back
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit ends)")


class Stopped(Exception):
    """Ctrl-C while an answer was written."""


class Chat:
    """A conversation and what the user may say to it."""

    def __init__(
        self, answerer: Answerer, adapter: Adapter | None, settings: ChatSettings, output: Output
    ) -> None:
        """Begin with an empty conversation."""
        self._answerer, self._settings, self._output = answerer, settings, output
        self._given = self._adapter = adapter
        self._system = settings.system
        self.turns: list[dict[str, Any]] = []
        self._left_out = 0
        self._seed = settings.seed

    def take(self, line: str) -> bool:
        """Do what a line says; returns whether the conversation goes on."""
        if not line.strip():
            return True
        if not line.startswith("/"):
            with _ctrl_c() as look:
                self._ask(line, look)
            return True
        word, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if word == "quit":
            return False
        if word == "reset":
            self._begin("The conversation begins again.")
        elif word == "system":
            self._system = rest or None
            self._begin("The conversation begins again, with " + ("it." if rest else "none."))
        elif word == "adapter":
            self._switch(rest)
        elif word == "help":
            self._note(_HELP)
        else:
            self._note(f"there is no /{word}; /help lists what there is.")
        return True

    def _begin(self, told: str) -> None:
        self.turns, self._left_out = [], 0
        self._note(told)

    def _switch(self, to: str) -> None:
        if self._given is None:
            self._note("there is no adapter: --adapter-path gives one.")
        elif to not in ("on", "off"):
            self._note("/adapter on, or /adapter off.")
        else:
            self._adapter = self._given if to == "on" else None
            self._note(f"The adapter is {to}.")

    def _note(self, text: str) -> None:
        """What is said beside the conversation, which may go into a pipe."""
        print(text, file=sys.stderr, flush=True)

    def _ask(self, text: str, look: Callable[[], None]) -> None:
        self.turns.append({"role": "user", "content": text})
        try:
            prompt = self._prompt(self._answerer.tokenizer)
        except DataError as error:
            self.turns.pop()
            self._note(str(error))
            return
        sampling = Sampling(self._settings.temperature, self._settings.top_p, self._seed)
        self._seed = (self._seed + 1) % MAX_SEED  # the same question may get another answer
        wanted = Wanted(self._settings.max_tokens, sampling)
        pieces: list[str] = []
        answer = self._answerer.answer(self._adapter, prompt, wanted, look)
        note = ""
        try:
            for piece in answer:
                pieces.append(piece)
                self._output.say(piece, end="")
        except Stopped:
            note = "(stopped)"
        self._output.say()
        if answer.finish == LENGTH:
            note = f"(cut after {answer.n_tokens:,} tokens: --max-tokens, or the context's end)"
        if note:
            self._note(note)
        if pieces:
            self.turns.append({"role": "assistant", "content": "".join(pieces)})
        else:
            self.turns.pop()

    def _prompt(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids of the conversation, without its oldest turns where it became too long."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        context = self._answerer.context
        # An answer has its whole room as long as that leaves at least half for the conversation.
        room = context - min(self._settings.max_tokens, context // 2)
        left_out = self._left_out
        while True:
            turns = [*system, *self.turns[left_out:]]
            ids = tokenizer.encode(tokenizer.render_chat(turns, True), add_special_tokens=False)
            if len(ids) <= room:
                break
            if left_out >= len(self.turns) - 1:
                raise DataError(
                    f"this message makes {len(ids):,} tokens, and there is room for {room:,} of "
                    f"the context's {context:,}. Shorten it, or raise --context where the model "
                    "has more positions."
                )
            left_out += 2
        if left_out > self._left_out:
            self._note(f"(the first {left_out} turns no longer fit, and are left out)")
        self._left_out = left_out
        return ids


@contextlib.contextmanager
def _ctrl_c() -> Iterator[Callable[[], None]]:
    """Within, Ctrl-C makes `look` raise at the next token; the second one ends the program."""
    pressed: list[int] = []

    def press(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    def look() -> None:
        if pressed:
            raise Stopped

    before = signal.signal(signal.SIGINT, press)
    try:
        yield look
    finally:
        signal.signal(signal.SIGINT, before)
