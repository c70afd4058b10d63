"""A model directory's tokenizer: text to ids, ids to text, chats to text.

`tokenizer.json` holds the whole tokenizer and the `tokenizers` library runs it; the files around
it only name the special tokens and the chat template. A large vocabulary takes 60 to 75 MB, so
training never loads one (see `lowtide.data.prepare`) and `tokenizers` is imported in `load`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.data.templates import ChatTemplate, Message
from lowtide.data.tokenizer_files import (
    TokenizerSettings,
    read_backend,
    read_settings,
    read_templates,
    readable_failures,
)
from lowtide.data.turns import template_traits
from lowtide.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    import tokenizers

_LEAST_SHARE, _PADDING = 0.95, 512  # models are padded by less: to a multiple of 64 to 512 rows


class Tokenizer:
    """The tokenizer of one model directory; make one with `Tokenizer.load`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: TokenizerSettings,
        template: ChatTemplate | None = None,
    ) -> None:
        self._backend = backend
        self._settings = settings
        self.template = template
        self.special_ids: frozenset[int] = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )

    @classmethod
    def load(cls, directory: Path | str, chat_template: str | None = None) -> Tokenizer:
        """Open the tokenizer of a model directory.

        Args:
            directory: A directory with `tokenizer.json` and, usually, `tokenizer_config.json`.
            chat_template: A file with a Jinja template to use instead of the directory's own, or
                "none" to use no template at all.

        Returns:
            The tokenizer.

        Raises:
            ModelError: The directory holds no tokenizer.json, or a file in it is broken.
            ConfigError: `chat_template` names a file that cannot be read.
        """
        directory = Path(directory)
        backend = read_backend(directory)
        try:
            settings = read_settings(directory, backend)
        except UnicodeEncodeError:
            raise ModelError(
                f"the tokenizer's files in {directory} name a token that holds half of a "
                "surrogate pair. Fetch them again."
            ) from None
        tokenizer = cls(backend, settings, _find_template(directory, chat_template, settings))
        tokenizer.decode(tokenizer.encode("a b."))  # a broken one fails now, not at some record
        return tokenizer

    @property
    def bos_id(self) -> int | None:
        """The token that starts a text, where the tokenizer has one."""
        return self._settings.bos_id

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, where the tokenizer has one."""
        return self._settings.eos_id

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Every token that ends generation.

        These are `eos_id`, those of the model's own configs, and the one with which the chat
        template ends a turn: some repositories name the end of a text only.
        """
        ends = self._settings.stop_ids
        if self.template is None:
            return ends
        marker = template_traits(self.template).end_of_turn
        ids = self.encode(marker, add_special_tokens=False) if marker else []
        if ids and ids[0] in self._backend.get_added_tokens_decoder():
            ends = ends | {ids[0]}
        return ends

    @property
    def vocab_size(self) -> int:
        """The number of tokens, those added to the base vocabulary included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def mismatch(self, vocab_size: int) -> str | None:
        """What speaks against using this tokenizer with a model of `vocab_size` tokens.

        A model may hold some tokens more than its tokenizer, to fill its rows up to a round
        number. Single ids that a model does not hold are an error where they occur.

        Args:
            vocab_size: The model's.

        Returns:
            One line with both sizes, or None where they fit.
        """
        added = self._backend.get_added_tokens_decoder()
        size = max(self.vocab_size, max(added, default=-1) + 1)
        remedy = "See that --tokenizer is the model's own."
        if size > vocab_size:
            return (
                f"the tokenizer has {size:,} tokens and the model {vocab_size:,}: a text that "
                f"uses one of the last {size - vocab_size:,} is refused. {remedy}"
            )
        if size < max(vocab_size / 2, min(vocab_size * _LEAST_SHARE, vocab_size - _PADDING)):
            return (
                f"the tokenizer has only {size:,} tokens and the model {vocab_size:,}: they may "
                f"not belong together, and ids would mean other words. {remedy}"
            )
        return None

    @property
    def chat_template(self) -> str | None:
        """The text of the chat template in use, if there is one."""
        return None if self.template is None else self.template.source

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text.

        Args:
            text: Any text that can be written as UTF-8.
            add_special_tokens: Add what the tokenizer puts around a text, such as BOS.

        Returns:
            The ids.

        Raises:
            DataError: The text holds half of a surrogate pair.
        """
        return list(self._encode(text, add_special_tokens).ids)

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text, and for each the characters `text[start:end]` that it came from.

        Args:
            text: Any text that can be written as UTF-8.
            add_special_tokens: Add what the tokenizer puts around a text, such as BOS.

        Returns:
            The ids and their spans; added special tokens have the empty span (0, 0).

        Raises:
            DataError: The text holds half of a surrogate pair.
        """
        encoding = self._encode(text, add_special_tokens)
        return list(encoding.ids), list(encoding.offsets)

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool, offsets: bool
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Several texts at once, on all cores: faster than one by one, with the same ids.

        Args:
            texts: Any that can be written as UTF-8.
            add_special_tokens: Add what the tokenizer puts around a text, such as BOS.
            offsets: Whether the spans are asked for, which costs half as much again.

        Returns:
            For each text as `encode_with_offsets`, with no spans where none were asked for.

        Raises:
            DataError: A text holds half of a surrogate pair.
        """
        run = self._backend.encode_batch if offsets else self._backend.encode_batch_fast
        try:
            encodings = run(list(texts), add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            return [self.encode_with_offsets(text, add_special_tokens) for text in texts]
        if not offsets:
            return [(list(one.ids), []) for one in encodings]
        return [(list(one.ids), list(one.offsets)) for one in encodings]

    def encode_document(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """A text that stands for itself, with BOS where the tokenizer adds it, but not twice.

        Args:
            text: Any text that can be written as UTF-8; it may begin with BOS, written out.

        Returns:
            As `encode_with_offsets`.

        Raises:
            DataError: The text holds half of a surrogate pair.
        """
        ids, offsets = self.encode_with_offsets(text)
        return self.without_second_bos(ids, offsets)

    def without_second_bos(
        self, ids: list[int], offsets: list[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens of a text that wrote out the BOS that the tokenizer adds, with one of them."""
        if self.bos_id is not None and ids[:2] == [self.bos_id] * 2:
            return ids[1:], offsets[1:]
        return ids, offsets

    def _encode(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        try:
            with readable_failures("read a text"):
                return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            problem = unencodable(text)
            if problem is None:
                raise
            raise DataError(f"the text cannot be tokenised: {problem}") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some ids."""
        with readable_failures("write a text"):
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of one id; None for an id that it does not hold."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """A conversation as text; encode it with `add_special_tokens=False`.

        Args:
            messages: The turns, each with `role` and `content`.
            add_generation_prompt: End with the header that opens an assistant turn.
            tools: Tool descriptions, for templates that list them.

        Returns:
            The rendered text.

        Raises:
            DataError: There is no chat template, or it refuses these messages.
        """
        if self.template is None:
            raise DataError(
                "this tokenizer has no chat template, so a conversation cannot be written as "
                "text. Pass one with --chat-template FILE, or --tokenizer DIR of a model that has "
                "one."
            )
        return self.template.render(messages, add_generation_prompt, tools)


def unencodable(text: str) -> str | None:
    """What keeps a text from being written as UTF-8, or None where nothing does."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode("ascii")
        return f"character {error.start + 1} is {half}, half of a surrogate pair"
    return None


def _find_template(
    directory: Path, given: str | None, settings: TokenizerSettings
) -> ChatTemplate | None:
    """The template that was asked for, else the directory's own, if it has one."""
    if given is not None and given.lower() == "none":
        return None
    if given is not None:
        return ChatTemplate(_read_template(Path(given)), settings.special_tokens, given)
    found = read_templates(directory)
    if not found:
        return None
    origin = f"the chat template of {directory}"
    return ChatTemplate(
        found["default"], settings.special_tokens, origin, tools_source=found.get("tool_use")
    )


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"cannot read the chat template {path}: {reason}. Pass a file with a Jinja template, "
            "or 'none' to use no chat template."
        ) from None
