"""Answers as text, one after another, from one model with or without an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lowtide.data.decoding import StreamDecoder
from lowtide.data.prompts import prompt_ids
from lowtide.data.tokenizer import Tokenizer
from lowtide.errors import DataError
from lowtide.model.adapter import Adapter
from lowtide.model.decoder import Decoder

from .generate import Generation, Sampling

STOP, LENGTH = "stop", "length"
DEFAULT_CONTEXT = 4096


class PromptTooLong(DataError):
    """A prompt has more tokens than there is room for.

    Args:
        found: its tokens.
        room: the most.
    """

    def __init__(self, found: int, room: int) -> None:
        super().__init__(
            f"the prompt has {found:,} tokens, and prompt and answer together may have {room:,}. "
            "Shorten it, or raise --context where the model has more positions."
        )

    @property
    def kind(self) -> str:
        """To a parent process it is a DataError like any other."""
        return DataError.__name__


@dataclass(frozen=True)
class Wanted:
    """What an answer should be like.

    Attributes:
        max_tokens: its most tokens.
        sampling: how they are chosen.
        stops: texts that end it; they are not part of it.
    """

    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...] = ()


class StopText:
    """Passes text on until one of `stops` is complete; what may begin one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Look for these texts, none of them empty."""
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Add text; returns what is certainly before any stop."""
        if not self._stops or self.found:
            return "" if self.found else text
        self._held += text
        ends = [(i + len(s), i) for s in self._stops if (i := self._held.find(s)) >= 0]
        if ends:
            self.found = True
            ready, self._held = self._held[: min(ends)[1]], ""
            return ready
        longest = max(self._begun(stop) for stop in self._stops)
        cut = len(self._held) - longest
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready

    def _begun(self, stop: str) -> int:
        """Characters at the end that `stop` begins with."""
        most = min(len(stop) - 1, len(self._held))
        return next((n for n in range(most, 0, -1) if self._held.endswith(stop[:n])), 0)

    def finish(self) -> str:
        """What was held back: no stop will complete it."""
        ready, self._held = self._held, ""
        return ready


class Answer:
    """The pieces of one answer, which is generated while they are taken.

    Attributes:
        n_prompt: tokens of the prompt.
        n_tokens: tokens generated so far, without the one that ends the answer.
        finish: why it ended, `STOP` or `LENGTH`; None before it has.
    """

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        wanted: Wanted,
        look: Callable[[], None] | None,
    ) -> None:
        """Nothing is read or generated yet."""
        self._generation, self._tokenizer = generation, tokenizer
        self._prompt, self._wanted, self._look = prompt, wanted, look
        self.n_prompt, self.n_tokens = len(prompt), 0
        self.finish: str | None = None

    def __iter__(self) -> Iterator[str]:
        """Text, piece by piece, each final; never empty."""
        decoder, stop = StreamDecoder(self._tokenizer), StopText(self._wanted.stops)
        for token in self._prompt:
            decoder.push(token)
        # The last token needs no position of its own: nothing is computed from it.
        room = self._generation.capacity - self.n_prompt + 1
        limit = min(self._wanted.max_tokens, room)
        ended = self._tokenizer.stop_ids
        sampling = self._wanted.sampling
        for token in self._generation.follow(self._prompt, limit, sampling, ended, self._look):
            self.n_tokens += 1
            if piece := stop.push(decoder.push(token)):
                yield piece
            if stop.found:
                break
        if not stop.found and (piece := stop.push(decoder.finish()) + stop.finish()):
            yield piece
        self.finish = STOP if stop.found or self.n_tokens < limit else LENGTH


def ask(model: Decoder, adapter: Adapter | None, prompt: str, max_tokens: int = 256) -> str:
    """The greedy answer to one question: what `lowtide generate` prints.

    Args:
        model: the frozen model, with its tokenizer beside it.
        adapter: LoRA matrices, or None for the base model.
        prompt: a user's turn where the model has a chat template, else a text to go on with.
        max_tokens: the answer's most tokens.

    Returns:
        The answer's text.

    Raises:
        DataError: the prompt is too long, or cannot be tokenised.
        ModelError: there is no usable tokenizer.
    """
    tokenizer = Tokenizer.load(model.directory)
    answerer = Answerer(model, tokenizer)
    wanted = Wanted(max_tokens, Sampling())
    return "".join(answerer.answer(adapter, prompt_ids(tokenizer, prompt), wanted))


class Answerer:
    """A model, its tokenizer, and room for a few sequences that are kept between answers.

    Each adapter, and the base model, has a sequence of its own as long as there is room, so that
    a conversation that goes on is not read again from its beginning.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, context: int | None = None, kept: int = 2
    ) -> None:
        """Nothing is allocated yet.

        Args:
            model: the frozen model.
            tokenizer: its tokenizer.
            context: tokens of prompt and answer together; None takes the model's positions, up
                to 4,096.
            kept: sequences that are kept.
        """
        positions = model.spec.max_positions
        self.context = min(context or DEFAULT_CONTEXT, positions)
        self._model, self.tokenizer, self._kept = model, tokenizer, kept
        self._generations: list[Generation] = []  # the last one was used last

    def keep_only(self, adapters: Sequence[Adapter]) -> None:
        """Forget sequences of adapters that are no longer in use; the base model's stay."""
        self._generations = [
            one
            for one in self._generations
            if one.adapter is None or any(one.adapter is each for each in adapters)
        ]

    def answer(
        self,
        adapter: Adapter | None,
        prompt: Sequence[int],
        wanted: Wanted,
        look: Callable[[], None] | None = None,
    ) -> Answer:
        """What follows a prompt. One answer at a time: the next one ends it.

        Args:
            adapter: LoRA matrices, or None for the base model.
            prompt: token ids, at least one.
            wanted: what the answer should be like.
            look: called before every token and each part of a long prompt; may raise.

        Returns:
            The answer, to be iterated over.

        Raises:
            PromptTooLong: the prompt is longer than the context.
            DataError: it has ids outside the vocabulary.
        """
        if len(prompt) > self.context:
            raise PromptTooLong(len(prompt), self.context)
        self._model.check_sequences([len(prompt)], max(prompt))
        generation = self._generation_for(adapter)
        return Answer(generation, self.tokenizer, prompt, wanted, look)

    def _generation_for(self, adapter: Adapter | None) -> Generation:
        found = next((g for g in self._generations if g.adapter is adapter), None)
        if found is None and len(self._generations) < self._kept:
            found = Generation(self._model, adapter, self.context)
        elif found is None:
            found = self._generations.pop(0)
            found.adapt(adapter)
        if found in self._generations:
            self._generations.remove(found)
        self._generations.append(found)
        return found
