"""The tokenizer of a model directory as metadata of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowtide.data.gguf_tokenizer import NO_MERGES, PIPELINE_KEY
from lowtide.data.gguf_vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from lowtide.data.pre_tokenizers import BYTE_LEVEL, SENTENCEPIECE, name_of
from lowtide.data.tokenizer_files import read_backend, read_settings, read_templates
from lowtide.errors import ModelError

_ROLES = {"unk": "unknown", "pad": "padding"}


def tokenizer_metadata(directory: Path, vocab_size: int) -> dict[str, Any]:
    """What a GGUF file says of a tokenizer.

    Args:
        directory: of tokenizer.json and the files around it.
        vocab_size: rows of the model's embedding; rows beyond the tokens get unused ones.

    Returns:
        Keys and values.

    Raises:
        ModelError: there is no tokenizer, it has more tokens than the model has rows, or llama.cpp
            has no tokenizer that works in the same way.
    """
    backend = read_backend(directory)
    settings = read_settings(directory, backend)
    state = json.loads(backend.to_str())
    pieces = _is_sentencepiece(state, directory)
    metadata: dict[str, Any] = {"tokenizer.ggml.model": SENTENCEPIECE if pieces else BYTE_LEVEL}
    if pieces:
        metadata["tokenizer.ggml.pre"] = "default"
        metadata["tokenizer.ggml.add_space_prefix"] = _prefixes(state)
    else:
        metadata["tokenizer.ggml.pre"] = _pre(state, directory)
    metadata.update(_tokens(state, vocab_size, pieces, directory))
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    metadata["tokenizer.ggml.merges"] = merges or NO_MERGES
    around = backend.encode("a", add_special_tokens=True).ids
    for role, token, at in (("bos", settings.bos_id, 0), ("eos", settings.eos_id, -1)):
        if token is not None:
            metadata[f"tokenizer.ggml.{role}_token_id"] = token
        metadata[f"tokenizer.ggml.add_{role}_token"] = token is not None and around[at] == token
    for role, name in _ROLES.items():
        text = settings.special_tokens.get(f"{role}_token")
        place = None if text is None else backend.token_to_id(text)
        if place is not None and place < vocab_size:
            metadata[f"tokenizer.ggml.{name}_token_id"] = place
    for name, template in read_templates(directory).items():
        suffix = "" if name == "default" else f".{name}"
        metadata[f"tokenizer.chat_template{suffix}"] = template
    state["model"] |= {"vocab": {}, "merges": []}
    metadata[PIPELINE_KEY] = json.dumps(state, ensure_ascii=False)
    return metadata


def _is_sentencepiece(state: Mapping[str, Any], directory: Path) -> bool:
    """Whether spaces are marks and bytes have tokens of their own, or all is bytes."""
    model = state["model"]
    stages = json.dumps([state.get("pre_tokenizer"), state.get("decoder")])
    if model.get("type") == "BPE" and model.get("byte_fallback"):
        return True
    if model.get("type") == "BPE" and '"ByteLevel"' in stages:
        return False
    raise ModelError(
        f"the tokenizer in {directory} is of kind {model.get('type')!r} without bytes for what it "
        "does not know; a GGUF file holds SentencePiece's pieces or byte-level BPE. Nothing was "
        "written."
    )


def _prefixes(state: Mapping[str, Any]) -> bool:
    """Whether a text gets a space before it."""
    stages = json.dumps([state.get("normalizer"), state.get("pre_tokenizer")])
    metaspace = '"Metaspace"' in stages and '"prepend_scheme": "never"' not in stages
    return '"Prepend"' in stages or metaspace


def _pre(state: Mapping[str, Any], directory: Path) -> str:
    name = name_of(state)
    if name is None:
        raise ModelError(
            f"the tokenizer in {directory} cuts texts in a way that llama.cpp has no name for, as "
            "far as lowtide knows them (pre_tokenizer in tokenizer.json): "
            f"{json.dumps(state.get('pre_tokenizer'), ensure_ascii=False)}. llama.cpp would cut "
            "them otherwise. Nothing was written; its own converter may know it."
        )
    return name


def _tokens(
    state: Mapping[str, Any], vocab_size: int, pieces: bool, directory: Path
) -> dict[str, Any]:
    """Tokens, their types and, for pieces, their scores."""
    texts = {place: text for text, place in state["model"]["vocab"].items()}
    types = dict.fromkeys(texts, NORMAL)
    unknown = state["model"].get("unk_token")
    for place, text in texts.items():
        if pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[place] = BYTE
    for added in state["added_tokens"]:
        place, text = added["id"], added["content"]
        texts[place] = text
        types[place] = CONTROL if added["special"] else USER_DEFINED
        if pieces and not added["special"]:
            texts[place] = text.replace(SPACE, " ")
    for place, text in texts.items():
        if pieces and text == unknown:
            types[place] = UNKNOWN
    if max(texts) >= vocab_size:
        raise ModelError(
            f"the tokenizer in {directory} has {max(texts) + 1} tokens and the model "
            f"{vocab_size} (vocab_size in config.json): they do not belong together. Give the "
            "model's own with --tokenizer DIR. Nothing was written."
        )
    every = range(vocab_size)
    found: dict[str, Any] = {
        "tokenizer.ggml.tokens": [texts.get(place, f"[PAD{place}]") for place in every],
        "tokenizer.ggml.token_type": [types.get(place, UNUSED) for place in every],
    }
    if pieces:
        ranks = _ranks(state["model"]["merges"])
        found["tokenizer.ggml.scores"] = [
            -float(ranks.get(texts.get(place, ""), len(ranks)))
            if types.get(place) == NORMAL
            else 0.0
            for place in every
        ]
    return found


def _ranks(merges: list[Any]) -> dict[str, int]:
    """By piece, the place of the first merge that makes it: the higher its score, the earlier."""
    ranks: dict[str, int] = {}
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, len(ranks))
    return ranks
