"""Text of a growing list of ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lowtide.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class StreamDecoder:
    """Text of a growing list of ids, piece by piece, each piece final.

    Joining every `push` and the `finish` gives `decode(all ids)` exactly. A token's text depends
    on its neighbours in three ways, and each decides what must wait:

    - A character may be spread over tokens: a trailing U+FFFD is held back until it is whole.
    - A run of byte tokens (`<0xF0>`) is judged as one, so it waits for the token that ends it.
    - The first token of a text may lose its leading space, so a window of ids is decoded together
      with the window before it, never alone.

    Args:
        tokenizer: The tokenizer that decodes.
        skip_special_tokens: Leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []
        self._context_length = 0
        self._pending: list[int] = []
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """Add one id; returns the text that has become final, which is often empty."""
        token = self._tokenizer.token(token_id)
        if token is None or (self._skip and token_id in self._tokenizer.special_ids):
            return ""  # no text, and no end to a run of byte tokens either
        self._pending.append(token_id)
        if _is_byte_token(token):
            return ""
        return self._emit(final=False)

    def finish(self) -> str:
        """The rest of the text, as it stands: nothing more will come."""
        return self._emit(final=True)

    def _emit(self, final: bool) -> str:
        text = self._decode(self._context + self._pending)[self._context_length :]
        ready = text if final else text.rstrip(_REPLACEMENT)
        piece = ready[self._emitted :]
        self._emitted = len(ready)
        if text and ready == text:
            self._context, self._pending, self._emitted = self._pending, [], 0
            self._context_length = len(self._decode(self._context))
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip)


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterable[str]:
    """The non-empty pieces of a stream of ids, in order."""
    decoder = StreamDecoder(tokenizer)
    for token_id in ids:
        if piece := decoder.push(token_id):
            yield piece
    if piece := decoder.finish():
        yield piece


def _is_byte_token(token: str) -> bool:
    if len(token) != 6 or not (token.startswith("<0x") and token[5] == ">"):
        return False
    return all(digit in "0123456789abcdefABCDEF" for digit in token[3:5])
