"""The tokens of a GGUF file: their texts, types and scores, and ids with a role."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lowtide.data.pre_tokenizers import BYTE_LEVEL, SENTENCEPIECE
from lowtide.errors import ModelError, shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Values of `tokenizer.ggml.token_type`."""
SPACE = "\u2581"  # how SentencePiece writes a space
REMEDY = "Give the directory of the model's own tokenizer.json with --tokenizer DIR."


class Vocabulary(NamedTuple):
    """The tokens of a file.

    Attributes:
        tokens: by id; unused ones at the end, which only fill rows up, are left out.
        types: of each.
        ids: by token.
    """

    tokens: list[str]
    types: list[float]
    ids: dict[str, int]


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The tokens of a file and their types.

    Args:
        metadata: of the file.

    Returns:
        The vocabulary.

    Raises:
        ModelError: there is none, it is of a kind that lowtide does not read, or contradicts
            itself.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        raise ModelError(
            "the GGUF file holds no tokenizer (tokenizer.ggml.model is "
            f"{'missing' if kind is None else shown(kind)}). {REMEDY}"
        )
    if kind not in (SENTENCEPIECE, BYTE_LEVEL):
        raise ModelError(
            f"the GGUF file's tokenizer is of kind {shown(kind)} (tokenizer.ggml.model); lowtide "
            f"reads {SENTENCEPIECE!r} and {BYTE_LEVEL!r}. {REMEDY}"
        )
    tokens = strings(metadata, "tokenizer.ggml.tokens")
    types = _numbers(metadata, "tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ModelError(
            f"the GGUF file has {len(tokens)} tokens (tokenizer.ggml.tokens) and {len(types)} "
            f"types of them (tokenizer.ggml.token_type). Download it again. {REMEDY}"
        )
    while tokens and types[-1] == UNUSED:
        tokens.pop()
        types.pop()
    ids: dict[str, int] = {}
    for place, token in enumerate(tokens):
        ids.setdefault(token, place)
    return Vocabulary(tokens, types, ids)


def strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    """A list of texts.

    Args:
        metadata: of the file.
        key: of the list.

    Returns:
        The texts, in a list of the caller's own.

    Raises:
        ModelError: it is missing or holds something else.
    """
    values = metadata.get(key)
    if values is None:
        raise ModelError(f"the GGUF file's tokenizer lacks {key}. {REMEDY}")
    if not isinstance(values, list | tuple) or not all(isinstance(one, str) for one in values):
        raise ModelError(f"the GGUF file's {key} holds what is no text. {REMEDY}")
    return list(values)


def _numbers(metadata: Mapping[str, Any], key: str, usual: Sequence[float]) -> list[float]:
    values = metadata.get(key, usual)
    found = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(found, list | tuple) or not all(
        isinstance(one, int | float) and math.isfinite(one) for one in found
    ):
        raise ModelError(f"the GGUF file's {key} holds what is no number. {REMEDY}")
    return list(found)


def as_piece(token: str) -> str:
    """Files write runs of spaces that are tokens as spaces."""
    return token.replace(" ", SPACE) if token.strip(" ") == "" else token


def read_scores(metadata: Mapping[str, Any], count: int) -> list[float]:
    """The score of each of `count` tokens.

    Args:
        metadata: of the file.
        count: how many are needed.

    Returns:
        The scores, in a list of the caller's own.

    Raises:
        ModelError: there are fewer.
    """
    scores = _numbers(metadata, "tokenizer.ggml.scores", [])
    if len(scores) < count:
        raise ModelError(
            f"the GGUF file has {count} tokens (tokenizer.ggml.tokens) and {len(scores)} scores of "
            f"them (tokenizer.ggml.scores). Download it again. {REMEDY}"
        )
    return scores


def merges_by_score(ids: Mapping[str, int], scores: Sequence[float]) -> list[list[str]]:
    """The merges that scores of pieces stand for, as transformers derives them.

    Args:
        ids: by piece.
        scores: by id.

    Returns:
        Pairs of pieces, the first to be merged first.
    """
    found = []
    for piece, place in ids.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in ids and right in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(scores[place], left, right) for left, right in known]
    found.sort(key=lambda one: (one[0], len(one[1]), len(one[2])), reverse=True)
    return [[left, right] for _, left, right in found]


def token_id(metadata: Mapping[str, Any], role: str, count: int) -> int | None:
    """The id of a token with a role.

    Args:
        metadata: of the file.
        role: `bos`, `eos`, `unknown` and so on.
        count: how many tokens there are.

    Returns:
        The id, or None where the file names none.

    Raises:
        ModelError: it is no id of a token.
    """
    key = f"tokenizer.ggml.{role}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    value = value.item() if hasattr(value, "item") else value
    place = value if isinstance(value, int) and not isinstance(value, bool) else -1
    if not 0 <= place < count:
        raise ModelError(
            f"the GGUF file's {key} is {shown(value)}, and it has {count} tokens. Download it "
            f"again. {REMEDY}"
        )
    return place
