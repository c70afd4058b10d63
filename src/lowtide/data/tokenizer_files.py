"""The files around a tokenizer: which of them says what, and in which order they are believed.

Special tokens come from tokenizer_config.json, else special_tokens_map.json, else the ids in
generation_config.json and config.json. A `null` in tokenizer_config.json is an answer too:
Qwen2.5 has no BOS, although its config.json names one. Ids that end generation are gathered from
all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.errors import ModelError

if TYPE_CHECKING:
    import tokenizers

SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json")


@dataclass(frozen=True)
class TokenizerSettings:
    """What the files beside tokenizer.json say."""

    bos_id: int | None
    eos_id: int | None
    stop_ids: frozenset[int]
    special_tokens: Mapping[str, str]
    chat_template: str | None


def read_backend(directory: Path) -> tokenizers.Tokenizer:
    """Load tokenizer.json, with the truncation and padding that it may carry switched off.

    Args:
        directory: The model directory.

    Returns:
        The tokenizer, as the library has it.

    Raises:
        ModelError: It is missing or broken; says which other tokenizer files there are.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelError(_no_tokenizer(directory))
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(
            f"{path} is not a tokenizer that can be read: {error}. Fetch it again, or point "
            "--tokenizer at a directory with a good one."
        ) from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _no_tokenizer(directory: Path) -> str:
    remedy = "Point --tokenizer at a directory that holds tokenizer.json."
    if not directory.is_dir():
        return f"no tokenizer: {directory} is not a directory. {remedy}"
    others = [name for name in _OTHER_TOKENIZERS if (directory / name).exists()]
    if not others:
        return f"no tokenizer: {directory} holds no tokenizer.json. {remedy}"
    return (
        f"no tokenizer: {directory} holds {', '.join(others)} but no tokenizer.json, the only "
        f"form that is read. {remedy} Or convert it, with transformers: "
        "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
    )


def read_settings(directory: Path, backend: tokenizers.Tokenizer) -> TokenizerSettings:
    """Gather the special tokens, the ids that stop generation and the chat template.

    Args:
        directory: The model directory.
        backend: Its loaded tokenizer; tokens that only tokenizer_config.json lists are added.

    Returns:
        The settings.

    Raises:
        ModelError: A file is broken, or names a token that the vocabulary does not hold.
    """
    config_path = directory / "tokenizer_config.json"
    config = _read_json(config_path)
    _add_missing_tokens(backend, config, config_path)
    named = _special_tokens(config, _read_json(directory / "special_tokens_map.json"))
    special = {name: token for name, token in named.items() if token is not None}
    sources = [directory / "generation_config.json", directory / "config.json"]
    models = [_read_json(path) for path in sources]
    stop_ids = {i for model in models for i in _ids(model.get("eos_token_id"))}

    def resolve(role: str) -> int | None:
        if f"{role}_token" in named:
            token = named[f"{role}_token"]
            return None if token is None else _id_of(backend, token, role, directory)
        ids = [i for model in models for i in _ids(model.get(f"{role}_token_id"))]
        return ids[0] if ids else None

    eos_id = resolve("eos")
    return TokenizerSettings(
        bos_id=resolve("bos"),
        eos_id=eos_id,
        stop_ids=frozenset(stop_ids if eos_id is None else stop_ids | {eos_id}),
        special_tokens=special,
        chat_template=_chat_template(directory, config),
    )


def _id_of(backend: tokenizers.Tokenizer, token: str, role: str, directory: Path) -> int:
    token_id = backend.token_to_id(token)
    if token_id is None:
        raise ModelError(
            f"{directory}: {role}_token is {token!r}, which tokenizer.json does not hold. The "
            "tokenizer files do not belong together; fetch them again."
        )
    return int(token_id)


def _special_tokens(
    config: Mapping[str, Any], special_map: Mapping[str, Any]
) -> dict[str, str | None]:
    named: dict[str, str | None] = {}
    for name in SPECIAL_NAMES:
        for source in (config, special_map):
            if name in source:
                named[name] = _token_text(source[name])
                break
    return named


def _token_text(value: Any) -> str | None:
    """A token as a string, or as the dictionary form {"content": ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], path: Path
) -> None:
    """Some repositories list added tokens in tokenizer_config.json only; Hugging Face adds them."""
    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        return
    import tokenizers

    numbered = [(int(key), entry) for key, entry in listed.items() if str(key).isdecimal()]
    for token_id, entry in sorted(numbered, key=lambda item: item[0]):
        content = _token_text(entry)
        if content is None or backend.token_to_id(content) is not None:
            continue
        flags = {
            name: bool(entry[name])
            for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            if isinstance(entry, dict) and name in entry
        }
        backend.add_tokens([tokenizers.AddedToken(content, **flags)])
        if backend.token_to_id(content) != token_id:
            raise ModelError(
                f"{path} gives token {content!r} the id {token_id}, but tokenizer.json leaves it "
                f"{backend.token_to_id(content)}. The tokenizer files do not belong together."
            )


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja where there is one, else tokenizer_config.json's."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ModelError(f"{path} is not UTF-8 text. Fetch it again.") from None
    value = config.get("chat_template")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        named = {
            entry["name"]: entry["template"]
            for entry in value
            if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
        }
        if "default" in named or len(named) == 1:
            return str(named.get("default", next(iter(named.values()))))
        raise ModelError(
            f"{directory / 'tokenizer_config.json'} holds the chat templates "
            f"{', '.join(named) or '(none)'} and none is named 'default'. Pass one with "
            "--chat-template FILE."
        )
    raise ModelError(
        f"{directory / 'tokenizer_config.json'}: chat_template is a {type(value).__name__}; "
        "expected a string or a list of {name, template}."
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}. Fetch it again.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}; expected a JSON object.")
    return value
