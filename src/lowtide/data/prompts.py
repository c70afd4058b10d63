"""Prompts as token ids, and answers as text: by itself, or as a worker of `lowtide.data.child`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lowtide.data.decoding import StreamDecoder
from lowtide.data.prepare import ask_child
from lowtide.data.tokenizer import Tokenizer
from lowtide.errors import DataError


def prompt_ids(tokenizer: Tokenizer, prompt: str, chat: bool = True) -> list[int]:
    """Token ids to start from: BOS for an empty prompt, a user turn where there is a template.

    Args:
        tokenizer: with or without a chat template.
        prompt: the user's text.
        chat: whether a template is used; without, the text is one to go on with.

    Returns:
        At least one id.

    Raises:
        DataError: the prompt is empty and the tokenizer has no BOS token.
    """
    if not prompt:
        if tokenizer.bos_id is None:
            raise DataError(
                "the prompt is empty and this tokenizer has no BOS token to start from. Give a "
                "--prompt."
            )
        return [tokenizer.bos_id]
    if tokenizer.chat_template is None or not chat:
        return tokenizer.encode_document(prompt)[0]
    text = tokenizer.render_chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


class Encoded(NamedTuple):
    """Prompts as token ids, and the tokens that end an answer."""

    prompts: list[list[int]]
    stop_ids: list[int]


class Interpreter:
    """Encodes prompts and decodes answers in child processes, which take their tokenizers along."""

    def __init__(self, tokenizer: Path, chat_template: str | None) -> None:
        """No child is started yet.

        Args:
            tokenizer: a directory with tokenizer.json.
            chat_template: a template file, "none", or None for the tokenizer's own.
        """
        template = None if chat_template is None else str(chat_template)
        self._base = {"tokenizer": str(tokenizer), "chat_template": template}

    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Token ids of prompts.

        Args:
            prompts: texts.

        Returns:
            At least one id each.

        Raises:
            DataError: a prompt cannot be used.
            ModelError: there is no usable tokenizer.
        """
        told = ask_child("prompts", json.dumps({**self._base, "encode": list(prompts)}), "prompts")
        return Encoded(told["prompts"], told["stop_ids"])

    def decode(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[str]:
        """Texts of what was generated.

        Args:
            pairs: token ids of a prompt, and those that followed.

        Returns:
            What followed, as `lowtide generate` prints it.
        """
        asked = {**self._base, "decode": [[list(prompt), list(made)] for prompt, made in pairs]}
        texts: list[str] = ask_child("prompts", json.dumps(asked), "texts")["texts"]
        return texts


def answer(request: str) -> str:
    """The JSON answer to a JSON request of an `Interpreter`.

    Args:
        request: `encode` or `decode`, with a tokenizer.

    Returns:
        `prompts` and `stop_ids`, or `texts`.
    """
    asked: dict[str, Any] = json.loads(request)
    tokenizer = Tokenizer.load(Path(asked["tokenizer"]), asked["chat_template"])
    if "encode" in asked:
        ids = [prompt_ids(tokenizer, prompt) for prompt in asked["encode"]]
        return json.dumps({"prompts": ids, "stop_ids": sorted(tokenizer.stop_ids)})
    return json.dumps({"texts": [_text(tokenizer, *pair) for pair in asked["decode"]]})


def _text(tokenizer: Tokenizer, prompt: Sequence[int], made: Sequence[int]) -> str:
    decoder = StreamDecoder(tokenizer)
    for token in prompt:
        decoder.push(token)
    return "".join([*(decoder.push(token) for token in made), decoder.finish()])
