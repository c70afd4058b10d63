"""The tokenizer and the chat template in a GGUF file, as the files of a model directory.

Two kinds are read: SentencePiece's pieces that merge by score, with bytes for what they do not know
(`tokenizer.ggml.model` is then called after the first model that had it), and byte-level BPE with
its merges, whose pre-tokenizer the file names. What lowtide writes also says, under
`lowtide.tokenizer`, what GGUF has no words for: tokenizer.json without its vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lowtide.data.gguf_vocabulary import (
    CONTROL,
    REMEDY,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    as_piece,
    merges_by_score,
    read_scores,
    read_vocabulary,
    strings,
    token_id,
)
from lowtide.data.pre_tokenizers import (
    PRE_TOKENIZERS,
    SENTENCEPIECE,
    SWALLOW_SPACE_AFTER,
    byte_level,
)
from lowtide.errors import ModelError, shown

PIPELINE_KEY = "lowtide.tokenizer"
NO_MERGES = ["none"]
"""Of a vocabulary of single bytes: llama.cpp wants a list, and reads one word as no merge."""
_WHOLE_KEY = "tokenizer.huggingface.json"
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_ENDS = ("eos", "eot", "eom")


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The files of a model directory that hold the tokenizer and the chat template.

    Args:
        metadata: the keys and values of a GGUF file.

    Returns:
        What tokenizer.json, tokenizer_config.json and, where needed, generation_config.json hold.

    Raises:
        ModelError: the file holds no tokenizer, one of a kind or with a pre-tokenizer that lowtide
            does not know, or one that contradicts itself.
    """
    state, vocabulary = _whole(metadata), None
    if state is None:
        vocabulary = read_vocabulary(metadata)
        state = _tokenizer(metadata, vocabulary)
    tokens = vocabulary.tokens if vocabulary else strings(metadata, "tokenizer.ggml.tokens")
    files = {"tokenizer.json": state, "tokenizer_config.json": _config(metadata, tokens)}
    ends = [token_id(metadata, role, len(tokens)) for role in _ENDS]
    if any(ends[1:]):
        files["generation_config.json"] = {"eos_token_id": [i for i in ends if i is not None]}
    return files


def _whole(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tokenizer.json that some files carry whole."""
    text = metadata.get(_WHOLE_KEY)
    return _object(text, _WHOLE_KEY) if isinstance(text, str) else None


def _object(text: str, key: str) -> dict[str, Any]:
    """A tokenizer.json, or a part of one."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("model", {}), dict):
        raise ModelError(f"the GGUF file's {key} is not a tokenizer.json. {REMEDY}")
    return found


def _tokenizer(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer.json."""
    pieces = metadata["tokenizer.ggml.model"] == SENTENCEPIECE
    make = _sentencepiece if pieces else _byte_level
    state = make(metadata, vocabulary)
    pipeline = metadata.get(PIPELINE_KEY)
    if isinstance(pipeline, str):
        said = _object(pipeline, PIPELINE_KEY)
        learned = {part: state["model"][part] for part in ("vocab", "merges")}
        return {**said, "model": {**state["model"], **said.get("model", {}), **learned}}
    swallows = SWALLOW_SPACE_AFTER.get(str(metadata.get("general.architecture")))
    added = []
    for place, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            content = as_piece(token) if pieces and kind == USER_DEFINED else token
            special = kind != USER_DEFINED
            rstrip = pieces and special and swallows is not None and token not in swallows
            added.append(_added(place, content, special, rstrip))
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **state}


def _added(place: int, content: str, special: bool, rstrip: bool) -> dict[str, Any]:
    return {
        "id": place,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": rstrip,
        "normalized": False,
        "special": special,
    }


def _byte_level(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """Byte-level BPE."""
    name = metadata.get("tokenizer.ggml.pre")
    pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        said = "is missing" if name is None else f"is {shown(name)}"
        raise ModelError(
            f"the GGUF file's pre-tokenizer (tokenizer.ggml.pre) {said}, and lowtide knows "
            f"{', '.join(PRE_TOKENIZERS)}: texts would be cut otherwise than in training. {REMEDY}"
        )
    merges = []
    written = strings(metadata, "tokenizer.ggml.merges")
    for merge in written if written != NO_MERGES else []:
        left, _, right = merge.partition(" ")
        if left not in vocabulary.ids or right not in vocabulary.ids:
            raise ModelError(
                f"the GGUF file's tokenizer merges {shown(merge)}, of which it does not hold both "
                f"parts. Download the file again. {REMEDY}"
            )
        merges.append([left, right])
    return {
        "normalizer": None if pre.normalizer is None else {"type": pre.normalizer},
        "pre_tokenizer": pre.stages(),
        "post_processor": _around(metadata, vocabulary, pre.bos) or byte_level(False),
        "decoder": byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.whole_words,
            "vocab": vocabulary.ids,
            "merges": merges,
        },
    }


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """SentencePiece's BPE: of all pairs whose union is a piece, the one with the highest score."""
    tokens = [
        as_piece(token) if kind == USER_DEFINED else token
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]
    ids: dict[str, int] = {}
    for place, token in enumerate(tokens):
        ids.setdefault(token, place)
    if "tokenizer.ggml.merges" in metadata:
        merges = [merge.split(" ", 1) for merge in strings(metadata, "tokenizer.ggml.merges")]
    else:
        scores = read_scores(metadata, len(tokens))
        for place, kind in enumerate(vocabulary.types):
            if kind == USER_DEFINED:  # these come before any other, whatever score a file gives
                scores[place] = 0.0
        merges = merges_by_score(ids, scores)
    unknown = token_id(metadata, "unknown", len(tokens))
    if unknown is None:
        unknown = next((i for i, kind in enumerate(vocabulary.types) if kind == UNKNOWN), None)
    prefixed = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefixed:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    prepend = {"type": "Prepend", "prepend": SPACE}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}
        if prefixed
        else replace,
        "pre_tokenizer": None,
        "post_processor": _around(metadata, vocabulary, True),
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges,
        },
    }


def _around(
    metadata: Mapping[str, Any], vocabulary: Vocabulary, bos: bool
) -> dict[str, Any] | None:
    """The post-processor that puts BOS before a text and EOS after it, as the file says."""
    marks = []
    for role, usual in (("bos", bos), ("eos", False)):
        place = token_id(metadata, role, len(vocabulary.tokens))
        wanted = bool(metadata.get(f"tokenizer.ggml.add_{role}_token", usual))
        marks.append(vocabulary.tokens[place] if wanted and place is not None else None)
    if marks == [None, None]:
        return None

    def special(text: str, side: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": text, "type_id": side}}

    def line(names: str) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for side, name in enumerate(names):
            parts += [special(marks[0], side)] if marks[0] is not None else []
            parts.append({"Sequence": {"id": name, "type_id": side}})
            parts += [special(marks[1], side)] if marks[1] is not None else []
        return parts

    named = {
        text: {"id": text, "ids": [vocabulary.ids[text]], "tokens": [text]}
        for text in marks
        if text is not None
    }
    return {
        "type": "TemplateProcessing",
        "single": line("A"),
        "pair": line("AB"),
        "special_tokens": named,
    }


def _config(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """tokenizer_config.json."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config["clean_up_tokenization_spaces"] = False
    for role, name in _ROLES.items():
        place = token_id(metadata, name, len(tokens))
        if place is not None:
            config[f"{role}_token"] = tokens[place]
        elif role == "bos":
            config["bos_token"] = None
    template = metadata.get("tokenizer.chat_template")
    named = [
        {"name": key.removeprefix("tokenizer.chat_template."), "template": metadata[key]}
        for key in metadata
        if key.startswith("tokenizer.chat_template.") and isinstance(metadata[key], str)
    ]
    if isinstance(template, str):
        config["chat_template"] = (
            [{"name": "default", "template": template}, *named] if named else template
        )
    elif named:
        config["chat_template"] = named
    return config
