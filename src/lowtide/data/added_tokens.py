"""What the files beside tokenizer.json change in it, as transformers applies them.

tokenizer.json is nearly the whole tokenizer. The rest comes from tokenizer_config.json:

- `added_tokens_decoder` (added_tokens.json in older repositories) lists tokens, and how white
  space beside them is treated; where it differs from tokenizer.json, it wins.
- Tokens that have a role (`pad_token`, `image_token`, `additional_special_tokens`) are special,
  whether or not tokenizer.json says so, and are added where it does not hold them.
- `split_special_tokens` reads a special token's name in a text as ordinary text.
- `legacy`: a SentencePiece vocabulary puts a space before a text. Where it is false, that is the
  start of the whole text alone; else every piece between special tokens gets one.
- `add_bos_token` and `add_eos_token` change nothing: tokenizer.json's own post-processor decides.
"""

from __future__ import annotations

from collections.abc import Mapping
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
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_GENERIC_CLASSES = ("", "PreTrainedTokenizer", "TokenizersBackend")
_SPACE = "\u2581"  # how SentencePiece writes a space


def named_tokens(
    config: Mapping[str, Any], special_map: Mapping[str, Any]
) -> dict[str, str | None]:
    """The tokens that have a role, by its name; an explicit null is an answer too.

    Args:
        config: tokenizer_config.json.
        special_map: special_tokens_map.json, which is believed over a tokenizer_config.json of the
            same age, and not read beside a newer one (which lists `added_tokens_decoder`).

    Returns:
        `bos_token` and its kin, then those of the model's own (`image_token`).
    """
    sources = [config] if "added_tokens_decoder" in config else [special_map, config]
    named: dict[str, str | None] = {}
    for name in SPECIAL_NAMES:
        for source in sources:
            if name in source:
                named[name] = token_text(source[name])
                break
    for source in reversed(sources):
        own = {k: v for k, v in source.items() if k.endswith("_token") and k not in SPECIAL_NAMES}
        more = source.get("extra_special_tokens")
        for name, value in {**own, **(more if isinstance(more, dict) else {})}.items():
            if (text := token_text(value)) is not None:
                named[name] = text
    return named


def token_text(value: Any) -> str | None:
    """A token as a string, or as the dictionary form {"content": ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def complete_backend(
    backend: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    path: Path,
    older: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}),
) -> None:
    """Add what tokenizer_config.json says to the tokenizer of tokenizer.json.

    Args:
        backend: The tokenizer, which is changed.
        config: tokenizer_config.json.
        path: Where it lies, for messages.
        older: special_tokens_map.json and added_tokens.json.

    Raises:
        ModelError: A token is listed with an id that it cannot have.
    """
    import tokenizers

    special_map, added = older
    special = _special_texts(config, special_map)
    if "added_tokens_decoder" in config:
        listed = _listed(config["added_tokens_decoder"])
    else:
        listed = {
            token_id: tokenizers.AddedToken(text, special=text in special)
            for text, token_id in added.items()
            if isinstance(token_id, int) and backend.token_to_id(text) is None
        }
    present = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    for token_id, token in sorted(listed.items(), key=lambda item: item[0]):
        if repr(token) in present:
            continue
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise ModelError(
                f"{path} gives token {token.content!r} the id {token_id}, but tokenizer.json "
                f"leaves it {backend.token_to_id(token.content)}. The tokenizer files do not "
                "belong together; fetch them again."
            )
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    named = named_tokens(config, special_map)
    needed = {named.get("bos_token"), named.get("eos_token")}
    for text in special:
        # A missing pad token may go beyond the model's own tokens; where a text starts and ends
        # may not, and is reported by who looks for it.
        if text not in known and (text not in needed or backend.token_to_id(text) is not None):
            backend.add_tokens([tokenizers.AddedToken(text, special=True)])
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))


def _listed(entries: Any) -> dict[int, tokenizers.AddedToken]:
    import tokenizers

    found = {}
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        content = token_text(entry)
        if content is None or not str(key).isdecimal():
            continue
        given = entry if isinstance(entry, dict) else {}
        flags = {name: bool(given[name]) for name in _FLAGS if name in given}
        found[int(key)] = tokenizers.AddedToken(content, **flags)
    return found


def _special_texts(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> list[str]:
    """Every token with a role."""
    named = named_tokens(config, special_map)
    texts = [text for text in named.values() if text is not None]
    for source in (special_map, config):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            values = source.get(key)
            found = [token_text(value) for value in values] if isinstance(values, list) else []
            texts += [text for text in found if text]
    return list(dict.fromkeys(texts))


def apply_legacy(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], model_type: str | None
) -> None:
    """Where a SentencePiece vocabulary puts its leading space: see the module's note on `legacy`.

    transformers builds a tokenizer anew, by these settings, where its class is the model's own,
    and else reads tokenizer.json as it stands.

    Args:
        backend: The tokenizer, which is changed.
        config: tokenizer_config.json.
        model_type: That of config.json, where there is one.
    """
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if name in _GENERIC_CLASSES or not _leads_with_space(backend):
        return
    if model_type is not None and name.lower() != f"{model_type}tokenizer":
        return
    from tokenizers import decoders, normalizers, pre_tokenizers

    prefix = config.get("add_prefix_space")
    prefixed = True if prefix is None else bool(prefix)
    scheme = "never" if not prefixed else "always" if config.get("legacy") else "first"
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, scheme, split=False)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)


def _leads_with_space(backend: tokenizers.Tokenizer) -> bool:
    """Whether this is SentencePiece's BPE with bytes for what it does not know."""
    if not getattr(backend.model, "byte_fallback", False):
        return False
    stages = [backend.normalizer, backend.pre_tokenizer]
    states = [b"" if stage is None else stage.__getstate__() for stage in stages]
    return any(kind in state for state in states for kind in (b'"Prepend"', b'"Metaspace"'))
