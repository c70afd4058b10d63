"""What the files beside tokenizer.json change, against transformers reading the same directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from family_tokenizers import Family, families
from tiny_tokenizer import CHATML, write_tiny

from lowtide.data.encode import Encoder
from lowtide.data.formats import PromptRecord, TextRecord
from lowtide.data.tokenizer import Tokenizer
from lowtide.errors import ConfigError, DataError, ModelError

FAMILIES = dict(families())
TEXT = "a <|im_start|> b <extra> c <pad>  d <|im_end|>\n  e"
GREEDY = {"lstrip": True, "rstrip": True, "single_word": False, "normalized": False}


def both(directory: Path) -> tuple[Tokenizer, Any]:
    from transformers import AutoTokenizer

    return Tokenizer.load(directory), AutoTokenizer.from_pretrained(str(directory))


def write(directory: Path, **files: Any) -> Path:
    """A tiny tokenizer with other files beside it; `a_b` is written to a_b.json."""
    write_tiny(directory, None)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


MARK = 257  # <|im_start|> in the tiny tokenizer, whose first free id is 259
CONFIGS: dict[str, dict[str, Any]] = {
    "other white space": {
        "added_tokens_decoder": {str(MARK): {"content": "<|im_start|>", **GREEDY, "special": True}}
    },
    "no longer special": {
        "added_tokens_decoder": {str(MARK): {"content": "<|im_start|>", **GREEDY, "special": False}}
    },
    "a token of its own": {
        "added_tokens_decoder": {"259": {"content": "<extra>", **GREEDY, "special": False}}
    },
    "a pad token that is new": {"pad_token": "<pad>"},
    "more special tokens": {"additional_special_tokens": ["<extra>", "<|im_end|>"]},
    "more, by their newer name": {"extra_special_tokens": ["<extra>"]},
    "named by role": {"extra_special_tokens": {"image_token": "<extra>"}},
    "a role of the model's own": {"image_token": "<extra>", "pad_token": "<pad>"},
    "an ordinary token that is special": {"pad_token": "d"},
    "tags as text": {"split_special_tokens": True},
    "a BOS that is asked for": {"add_bos_token": True, "bos_token": "<|im_start|>"},
    "an EOS that is asked for": {"add_eos_token": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_tokenizer_config(name: str, tmp_path: Path) -> None:
    config = {"eos_token": "<eos>", **CONFIGS[name], "tokenizer_class": "PreTrainedTokenizerFast"}
    ours, theirs = both(write(tmp_path / "d", tokenizer_config=config))
    for special in (True, False):
        ids = theirs.encode(TEXT, add_special_tokens=special)
        assert ours.encode(TEXT, special) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours._settings.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("decoder", [None, {}])
def test_older_files(decoder: dict[str, Any] | None, tmp_path: Path) -> None:
    """special_tokens_map.json and added_tokens.json count where added_tokens_decoder is not."""
    config: dict[str, Any] = {"eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if decoder is not None:
        config["added_tokens_decoder"] = decoder
    roles = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>", **GREEDY}}
    directory = write(
        tmp_path / "d",
        tokenizer_config=config,
        special_tokens_map=roles,
        added_tokens={"<extra>": 259, "<eos>": 256},
    )
    ours, theirs = both(directory)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert ours._settings.special_tokens == theirs.special_tokens_map


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "TokenizersBackend", ""])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "phi3", None])
@pytest.mark.parametrize("legacy", [True, False, None])
def test_where_the_leading_space_goes(
    name: str, model_type: str | None, legacy: bool | None, tmp_path: Path
) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    more = {"tokenizer_class": name, "legacy": legacy}
    config |= {key: value for key, value in more.items() if value not in ("", None)}
    family = Family("", FAMILIES["mistral"].tokenizer, config, "")
    directory = family.write(tmp_path / "d")
    (directory / "config.json").unlink()
    if model_type is not None:
        (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours, theirs = both(directory)
    for text in ("<s>Once upon</s> a time", " there", "  x", "", "<s>", "a</s>b <s> c"):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids, False) == theirs.decode(ids)


@pytest.mark.parametrize("prefix", [True, False])
def test_no_leading_space_at_all(prefix: bool, tmp_path: Path) -> None:
    config = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": prefix, "legacy": True}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    family = Family("llama", FAMILIES["mistral"].tokenizer, config, "")
    ours, theirs = both(family.write(tmp_path / "d"))
    for text in ("Once <s>upon", " there"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), True)


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    ours, theirs = both(write(tmp_path / "d", tokenizer_config={"chat_template": named}))
    chat = [{"role": "user", "content": "x"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in (None, tools):
        expected = theirs.apply_chat_template(chat, tools=given, tokenize=False)
        assert ours.render_chat(chat, tools=given) == expected == ("T" if given else "D")


def test_template_files(tmp_path: Path) -> None:
    config = {"chat_template": "C"}
    directory = write(tmp_path / "d", tokenizer_config=config)
    more = directory / "additional_chat_templates"
    more.mkdir()
    (directory / "chat_template.jinja").write_text("Jé", encoding="utf-8")
    (more / "tool_use.jinja").write_text("T")
    chat = [{"role": "user", "content": "x"}]
    ours, theirs = both(directory)
    for given in (None, [{"type": "function", "function": {"name": "f"}}]):
        expected = theirs.apply_chat_template(chat, tools=given, tokenize=False)
        assert ours.render_chat(chat, tools=given) == expected == ("T" if given else "Jé")


def test_a_template_that_is_given_mends_a_broken_one(tmp_path: Path) -> None:
    """The remedy that a message names has to work."""
    named = [{"name": "rag", "template": "R"}, {"name": "tool_use", "template": "T"}]
    directory = write(tmp_path / "d", tokenizer_config={"chat_template": named})
    with pytest.raises(ModelError, match=r"templates rag, tool_use and none is named 'default'"):
        Tokenizer.load(directory)
    given = tmp_path / "mine.jinja"
    given.write_text(CHATML)
    assert Tokenizer.load(directory, str(given)).chat_template == CHATML
    assert Tokenizer.load(directory, "none").template is None
    with pytest.raises(ConfigError, match="cannot read the chat template"):
        Tokenizer.load(directory, str(tmp_path / "no.jinja"))


@pytest.mark.parametrize("name", ["llama2-legacy-False", "gemma", "llama3"])
def test_bos_is_not_doubled(name: str, tmp_path: Path) -> None:
    """Texts that were rendered by somebody else begin with BOS already."""
    tokenizer = Tokenizer.load(FAMILIES[name].write(tmp_path / "d"), "none")
    bos = tokenizer.token(tokenizer.bos_id or 0)
    encoder = Encoder(tokenizer, 100, 1000)
    for text in ("Hello", f"{bos}Hello"):
        ids = encoder.encode(TextRecord("here", text)).ids
        assert ids.count(tokenizer.bos_id) == 1
        assert ids[0] == tokenizer.bos_id
        windows = encoder.windows(text, tmp_path)
        assert [i for window in windows for i in window.ids].count(tokenizer.bos_id) == 1
    masked = Encoder(tokenizer, 100, 1000, mask_prompt=True)
    encoded = masked.encode(PromptRecord("here", f"{bos}Hello", " you"))
    trained = [i for i, flag in zip(encoded.ids, encoded.trained, strict=True) if flag]
    assert tokenizer.decode(trained[:-1], False).strip() == "you"


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (258, "the tokenizer has 259 tokens and the model 258: a text that uses one of the last 1"),
        (259, None),
        (320, None),
        (510, None),
        (519, "the tokenizer has only 259 tokens and the model 519: they may not belong together"),
        (1024, "the tokenizer has only 259 tokens and the model 1,024"),
    ],
)
def test_sizes_that_do_not_match(vocab_size: int, message: str | None, tiny: Tokenizer) -> None:
    found = tiny.mismatch(vocab_size)
    if message is None:
        assert found is None
    else:
        assert message in str(found)
        assert "--tokenizer" in str(found)


def test_padding_of_real_models_is_no_mismatch(qwen: Tokenizer) -> None:
    for vocab_size in (151_936, 152_064):
        assert qwen.mismatch(vocab_size) is None
    assert "151,665 tokens and the model 151,000" in str(qwen.mismatch(151_000))
    assert "only 151,665 tokens and the model 262,144" in str(qwen.mismatch(262_144))


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json"])
def test_only_another_form_of_tokenizer(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ModelError, match=rf"holds {name} but no tokenizer.json.*convert it, with"):
        Tokenizer.load(tmp_path)


def test_a_model_of_unknown_kind(tiny_directory: Path) -> None:
    path = tiny_directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"] = {"type": "Telepathy", "vocab": {}}
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"is not a tokenizer that can be read.*--tokenizer"):
        Tokenizer.load(tiny_directory)


def test_a_conversation_without_a_template(tiny_plain: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"--chat-template FILE.*--tokenizer DIR"):
        tiny_plain.render_chat([{"role": "user", "content": "x"}])
