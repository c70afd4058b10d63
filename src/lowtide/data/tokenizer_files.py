"""The files around a tokenizer: which of them says what, and in which order they are believed.

Special tokens come from tokenizer_config.json and special_tokens_map.json (`added_tokens.py` says
which wins), else from the ids in generation_config.json and config.json. A `null` in
tokenizer_config.json is an answer too: a model may have no BOS although its config.json names
one. Ids that end generation are gathered from all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.data.added_tokens import apply_legacy, complete_backend, named_tokens
from lowtide.errors import ModelError, shown

if TYPE_CHECKING:
    import tokenizers

NO_TOKENIZER_FILE = "gguf.no-tokenizer"
"""Says why a GGUF file's tokenizer could not be written beside its config.json."""
_OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json")


@dataclass(frozen=True)
class TokenizerSettings:
    """What the files beside tokenizer.json say."""

    bos_id: int | None
    eos_id: int | None
    stop_ids: frozenset[int]
    special_tokens: Mapping[str, str]
    """What a template sees: `bos_token` and so on, and the model's own."""


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


@contextmanager
def readable_failures(what: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into an error with a remedy.

    It raises plain `Exception`, and where it panics a class of pyo3's that is no `Exception`.

    Args:
        what: What it was asked to do, for the message.

    Raises:
        ModelError: It failed.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"the tokenizer cannot {what}: {error}. Fetch tokenizer.json again, or point "
            "--tokenizer at a directory with a good one."
        ) from None


def _no_tokenizer(directory: Path) -> str:
    remedy = "Point --tokenizer at a directory that holds tokenizer.json."
    if not directory.is_dir():
        return f"no tokenizer: {directory} is not a directory. {remedy}"
    if (directory / NO_TOKENIZER_FILE).is_file():
        return f"no tokenizer: {read_json(directory / NO_TOKENIZER_FILE).get('reason')}"
    others = [name for name in _OTHER_TOKENIZERS if (directory / name).exists()]
    if not others:
        return f"no tokenizer: {directory} holds no tokenizer.json. {remedy}"
    return (
        f"no tokenizer: {directory} holds {', '.join(others)} but no tokenizer.json, the only "
        f"form that is read. {remedy} Or convert it, with transformers: "
        "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
    )


def read_settings(directory: Path, backend: tokenizers.Tokenizer) -> TokenizerSettings:
    """Gather the special tokens and the ids that stop generation, and complete the tokenizer.

    Args:
        directory: The model directory.
        backend: Its loaded tokenizer; what the files beside it say of it is applied.

    Returns:
        The settings.

    Raises:
        ModelError: A file is broken, or names a token that the vocabulary does not hold.
    """
    config_path = directory / "tokenizer_config.json"
    config = read_json(config_path)
    special_map = read_json(directory / "special_tokens_map.json")
    sources = [directory / "generation_config.json", directory / "config.json"]
    models = [read_json(path) for path in sources]
    older = (special_map, read_json(directory / "added_tokens.json"))
    complete_backend(backend, config, config_path, older)
    apply_legacy(backend, config, models[1].get("model_type"))
    named = named_tokens(config, special_map)
    special = {name: token for name, token in named.items() if token is not None}
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
    )


def _id_of(backend: tokenizers.Tokenizer, token: str, role: str, directory: Path) -> int:
    token_id = backend.token_to_id(token)
    if token_id is None:
        raise ModelError(
            f"{directory}: {role}_token is {shown(token)}, which tokenizer.json does not hold. The "
            "tokenizer files do not belong together; fetch them again."
        )
    return int(token_id)


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def read_templates(directory: Path) -> dict[str, str]:
    """The chat templates of a model directory, by name.

    Files (chat_template.jinja, additional_chat_templates/NAME.jinja) win over the text, or the
    list of named texts, in tokenizer_config.json.

    Args:
        directory: The model directory.

    Returns:
        `default` and perhaps others, such as `tool_use`; nothing where there is none.

    Raises:
        ModelError: A file is broken, or several templates leave it open which one is meant.
    """
    files = {"default": directory / "chat_template.jinja"}
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        files[path.stem] = path
    found = {name: _read_text(path) for name, path in files.items() if path.is_file()}
    path = directory / "tokenizer_config.json"
    value = read_json(path).get("chat_template") if not found else None
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        found = {
            str(entry["name"]): str(entry["template"])
            for entry in value
            if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
        }
    elif value is not None:
        raise ModelError(
            f"{path}: chat_template is a {type(value).__name__}; expected a string or a list of "
            "{name, template}. Mend it, or pass a template with --chat-template FILE."
        )
    if "default" not in found and len(found) == 1:
        found["default"] = next(iter(found.values()))
    if "default" not in found and (found or value is not None):
        raise ModelError(
            f"{path if value is not None else directory} holds the chat templates "
            f"{', '.join(found) or '(none)'} and none is named 'default'. Pass one with "
            "--chat-template FILE."
        )
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ModelError(f"{path} is not UTF-8 text. Fetch it again.") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}.") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file; an empty one where there is no file."""
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
