"""Pre-tokenizers by the names that GGUF files give them (`tokenizer.ggml.pre`).

A GGUF file holds no regular expression: llama.cpp knows them by name. This is the same table, as
pipelines of the `tokenizers` library. The names are partly those of models, which is why they
stand in a file of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

SENTENCEPIECE, BYTE_LEVEL = "llama", "gpt2"
"""Values of `tokenizer.ggml.model`: pieces that merge by score; byte-level BPE with merges."""
SWALLOW_SPACE_AFTER = {"phi3": ("<unk>", "<s>", "<|endoftext|>")}
"""Architectures whose special tokens, but for these, take the white space after them."""

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_THREE_DIGITS = rf"{_ENDINGS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_ONE_DIGIT = rf"{_ENDINGS}|{_LETTERS}|\p{{N}}|{_REST}"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED_ONE_DIGIT = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASHED}"
_CASED_ENDINGS = rf"{_CASED[0]}{_ENDINGS}?|{_CASED[1]}{_ENDINGS}?|\p{{N}}{{1,3}}|{_SLASHED}"


class PreTokenizer(NamedTuple):
    """How a text is cut before BPE.

    Attributes:
        pattern: what is cut out of the text; None is GPT-2's own pattern.
        digits: whether each digit is cut out first.
        whole_words: whether a piece that is a token stays whole, whatever merges say.
        normalizer: a form of Unicode that comes before.
        bos: whether a text starts with BOS where the file does not say.
    """

    pattern: str | None
    digits: bool = False
    whole_words: bool = False
    normalizer: str | None = None
    bos: bool = False

    def stages(self) -> dict[str, Any]:
        """As tokenizer.json's `pre_tokenizer`."""
        first: list[dict[str, Any]] = []
        if self.digits:
            first = [{"type": "Digits", "individual_digits": True}]
        elif self.pattern is not None:
            split = {"type": "Split", "pattern": {"Regex": self.pattern}}
            first = [{**split, "behavior": "Isolated", "invert": False}]
        return {"type": "Sequence", "pretokenizers": [*first, byte_level(self.pattern is None)]}


def byte_level(use_regex: bool) -> dict[str, Any]:
    """The stage that writes bytes as letters."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


_GPT2, _DIGITS = PreTokenizer(None), PreTokenizer(None, digits=True)
_LLAMA3 = PreTokenizer(_THREE_DIGITS, whole_words=True, bos=True)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS,
    "refact": _DIGITS,
    "starcoder": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": PreTokenizer(_THREE_DIGITS),
    "smaug-bpe": PreTokenizer(_THREE_DIGITS),
    "qwen2": PreTokenizer(_ONE_DIGIT, normalizer="NFC"),
    "tekken": PreTokenizer(_CASED_ONE_DIGIT, whole_words=True, bos=True),
    "gpt-4o": PreTokenizer(_CASED_ENDINGS),
}
"""The first name of equal ones is the one that is written."""


def name_of(state: Mapping[str, Any]) -> str | None:
    """The name of a byte-level BPE's pre-tokenizer.

    Args:
        state: a parsed tokenizer.json.

    Returns:
        The name, or None where llama.cpp has no pre-tokenizer that cuts in this way.
    """
    cuts = _cuts(state.get("pre_tokenizer"))
    whole = bool(state["model"].get("ignore_merges"))
    normalizer = state.get("normalizer")
    form = None if normalizer is None else normalizer.get("type")
    for name, one in PRE_TOKENIZERS.items():
        same = (_cuts(one.stages()), one.whole_words) == (cuts, whole)
        if same and form in (None, one.normalizer):
            return name
    return None


def _cuts(stage: Any) -> list[Any]:
    """What a pipeline does, however it is written down."""
    if not isinstance(stage, Mapping):
        return [stage]
    if stage["type"] == "Sequence":
        return [cut for one in stage["pretokenizers"] for cut in _cuts(one)]
    if stage["type"] == "Split":
        # A pattern that covers every text leaves nothing between its matches.
        kept = (stage["behavior"], bool(stage["invert"]))
        known = kept in (("Isolated", False), ("Removed", True))
        return [("Split", stage["pattern"].get("Regex"), known or kept)]
    if stage["type"] == "ByteLevel":
        return [("ByteLevel", stage["add_prefix_space"], stage.get("use_regex", True))]
    return [tuple(sorted((key, repr(value)) for key, value in stage.items()))]
