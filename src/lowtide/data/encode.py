"""From a record to token ids and the flags that say which of them are trained on.

Where the tokenizer has a chat template, every kind of record but `text` becomes a conversation,
because that is how the model will be asked. Without one, prompt and completion are one text.

Masks are found in characters and carried to tokens by the tokenizer's offsets, never by counting
the tokens of a prompt on its own: tokens may reach across the boundary. A token is trained on
where any of its characters is. `turns.py` says where in a conversation the assistant speaks.

    full    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    start   the length of the turns before, rendered with the generation prompt
    end     the length of the turns up to this one, less the white space after its end marker
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from lowtide.data.files import Tally
from lowtide.data.formats import (
    ChatRecord,
    InstructionRecord,
    PromptRecord,
    Record,
    TextRecord,
)
from lowtide.data.stream import stream_ids
from lowtide.data.templates import TemplateRefusal
from lowtide.data.tokenizer import Tokenizer
from lowtide.data.turns import Conversation, Span, assistant_spans, refusal_remedy
from lowtide.errors import ConfigError, DataError

TEMPLATE = "not expressible in the chat template"
"""What records that the template refuses are counted under."""
_BATCH_RECORDS, _BATCH_CHARS = 128, 1 << 17
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


class Encoded(NamedTuple):
    """One sequence for training."""

    ids: list[int]
    trained: list[int]
    """1 where the token is a label; the first token is never predicted."""
    dropped_tokens: int
    """Tokens cut off at the end because the record was too long."""
    digest: int = 0
    """64 bits of the whole record's ids, by which equal records are found."""
    where: str = ""
    """The record's place, for messages."""

    @property
    def trained_tokens(self) -> int:
        """Tokens that are predicted and counted in the loss."""
        return sum(self.trained[1:])


class _Text(NamedTuple):
    """What a record becomes before it is tokenised."""

    where: str
    text: str
    spans: list[Span]
    """What is trained on, where prompts are masked."""
    plain: bool
    """It stands for itself, with BOS and EOS; what a chat template wrote has its own."""


class Encoder:
    """Encodes records for one tokenizer and one model.

    Args:
        tokenizer: The tokenizer, with the chat template to use, if any.
        max_seq_length: Longer records are cut off at the end.
        vocab_size: The model's; an id beyond it means that the two do not match.
        mask_prompt: Train on completions and assistant turns only.

    Raises:
        ConfigError: `max_seq_length` leaves nothing to predict.
    """

    def __init__(
        self, tokenizer: Tokenizer, max_seq_length: int, vocab_size: int, mask_prompt: bool = False
    ) -> None:
        if max_seq_length < 2:
            raise ConfigError(
                f"max_seq_length is {max_seq_length}; expected at least 2, since each token is "
                "predicted from those before it."
            )
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self.vocab_size = vocab_size
        self.mask_prompt = mask_prompt

    def encode(self, record: Record) -> Encoded:
        """Tokenise one record, mask it and cut it to length.

        Args:
            record: The record.

        Returns:
            Its ids and flags; there may be no trained token left.

        Raises:
            DataError: The chat template cannot express the record, or an id is not the model's.
            ConfigError: Prompts are to be masked and the record has none.
        """
        return next(self.encode_all([record]))

    def encode_all(
        self, records: Iterable[Record], problems: Tally | None = None
    ) -> Iterator[Encoded]:
        """Tokenise records, some at a time, which takes all cores.

        Args:
            records: The records; at most `_BATCH_CHARS` characters and one record are held.
            problems: Takes the records that cannot be encoded; None ends with an error.

        Yields:
            What `encode` returns for each.

        Raises:
            DataError: As `encode`, of the first record that is wrong.
            ConfigError: As `encode`.
        """
        batch: list[_Text] = []
        chars = 0
        for record in records:
            try:
                batch.append(self._text(record))
            except DataError as error:
                if problems is None:
                    raise
                problems.add(str(error), TEMPLATE)
                continue
            chars += len(batch[-1].text)
            if len(batch) == _BATCH_RECORDS or chars > _BATCH_CHARS:
                yield from self._encoded(batch)
                batch, chars = [], 0
        yield from self._encoded(batch)

    def windows(self, pieces: Iterable[str], where: Path) -> Iterator[Encoded]:
        """A long text as one stream of tokens, cut into windows of `max_seq_length`.

        The tokens are those of the text in one piece, so that no cut changes one. A last window
        too short to predict anything comes with no ids, its token counted as dropped.

        Args:
            pieces: The text, in order.
            where: Its file, for messages.

        Yields:
            The windows in order.

        Raises:
            DataError: An id is not the model's.
            ConfigError: Prompts are to be masked and a text has none.
        """
        if self.mask_prompt:
            raise _nothing_to_mask(str(where))
        waiting: list[int] = []
        for ids in stream_ids(self.tokenizer, pieces):
            self._check_ids(ids, str(where))
            waiting += ids
            whole = len(waiting) - len(waiting) % self.max_seq_length
            for start in range(0, whole, self.max_seq_length):
                yield _window(waiting[start : start + self.max_seq_length])
            del waiting[:whole]
        if len(waiting) == 1:
            yield Encoded([], [], 1)
        elif waiting:
            yield _window(waiting)

    def _encoded(self, texts: Sequence[_Text]) -> Iterator[Encoded]:
        """Texts that are waiting, those in a row that are of one sort at a time."""
        masked = self.mask_prompt
        for plain, group in groupby(texts, lambda text: text.plain):
            some = list(group)
            encoded = self.tokenizer.encode_batch([t.text for t in some], plain, masked)
            for text, (ids, offsets) in zip(some, encoded, strict=True):
                if plain:
                    ids, offsets = self.tokenizer.without_second_bos(ids, offsets)
                trained = _flags(offsets, text.spans) if masked else [1] * len(ids)
                if plain:
                    self._end(ids, trained)
                self._check_ids(ids, text.where)
                cut = self.max_seq_length
                yield Encoded(
                    ids[:cut], trained[:cut], max(0, len(ids) - cut), _digest(ids), text.where
                )

    def _text(self, record: Record) -> _Text:
        try:
            match record:
                case TextRecord():
                    if self.mask_prompt:
                        raise _nothing_to_mask(record.where)
                    return _plain(record.where, "", record.text)
                case ChatRecord():
                    chat = self._chat(record.messages, record.tools, record.variables)
                case PromptRecord():
                    if self.tokenizer.template is None:
                        return _plain(record.where, record.prompt, record.completion)
                    chat = self._chat(_exchange(record.prompt, record.completion))
                case InstructionRecord():
                    if self.tokenizer.template is None:
                        return _plain(record.where, _alpaca_prompt(record), record.output)
                    parts = (record.instruction, record.input)
                    prompt = "\n\n".join(part for part in parts if part.strip())
                    chat = self._chat(_exchange(prompt, record.output))
        except DataError as error:
            raise DataError(f"{record.where}: {error}") from None
        return _Text(record.where, *chat, plain=False)

    def _end(self, ids: list[int], trained: list[int]) -> None:
        """EOS behind a text, where the tokenizer has one; it is always trained on."""
        eos = self.tokenizer.eos_id
        if eos is not None:
            if not ids or ids[-1] != eos:
                ids.append(eos)
                trained.append(1)
            trained[-1] = 1

    def _chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[Span]]:
        """A conversation as text, and where in it the assistant speaks if that is asked for."""
        template = self.tokenizer.template
        if template is None:
            raise DataError(
                "a conversation needs a chat template, and there is none. Pass one with "
                "--chat-template FILE, or --tokenizer DIR of a model that has one; or turn the "
                "chats into prompt and completion records, which are trained on as plain text "
                "where there is no template (as with --chat-template none)."
            )
        conversation = Conversation(template, messages, tools, variables)
        try:
            full = conversation.render()
            return full, assistant_spans(conversation, full) if self.mask_prompt else []
        except TemplateRefusal as refusal:
            raise DataError(f"{refusal}. {refusal_remedy(conversation)}") from None

    def _check_ids(self, ids: Sequence[int], where: str) -> None:
        largest = max(ids, default=0)
        if largest >= self.vocab_size:
            raise DataError(
                f"{where}: tokenizer and model do not match: token "
                f"{self.tokenizer.token(largest)!r} has id {largest}, and the model has "
                f"{self.vocab_size} tokens. Point --tokenizer at the model's own directory."
            )


def _plain(where: str, prompt: str, completion: str) -> _Text:
    text = prompt + completion
    return _Text(where, text, [(len(prompt), len(text))], plain=True)


def _window(ids: list[int]) -> Encoded:
    return Encoded(ids, [1] * len(ids), 0, _digest(ids))


def _digest(ids: Sequence[int]) -> int:
    raw = array("i", ids).tobytes()
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little")


def _flags(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """1 for each token with a character inside a span; added special tokens have none."""
    flags = []
    k = 0
    for start, end in offsets:
        while k < len(spans) and spans[k][1] <= start:
            k += 1
        flags.append(int(k < len(spans) and spans[k][0] < end and start < end))
    return flags


def _exchange(prompt: str, completion: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    ]


def _alpaca_prompt(record: InstructionRecord) -> str:
    layout = _ALPACA_WITH_INPUT if record.input.strip() else _ALPACA
    return layout.format(instruction=record.instruction, input=record.input)


def _nothing_to_mask(where: str) -> ConfigError:
    return ConfigError(
        f"{where}: --mask-prompt needs prompts to mask, and plain text has none. Train without "
        "it, or use prompt and completion or chat records."
    )
