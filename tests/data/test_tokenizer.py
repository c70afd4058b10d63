"""Ids and texts equal transformers' on real tokenizers; streaming equals decoding at once."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowtide.data.decoding import StreamDecoder, decode_stream
from lowtide.data.tokenizer import Tokenizer
from lowtide.errors import ConfigError, DataError, ModelError

AWKWARD = [
    "",
    " ",
    "\n\n\n",
    "Once upon a time, there was a little girl.",
    "  two spaces   and\ttabs \n  then lines\r\n\r\n end  ",
    "emoji 👩🏽‍🚀🎉 flags 🇸🇪 and e\u0301 combining",
    "漢字とかなカナ 한국어 العربية हिन्दी",
    "<s> </s> <|im_start|>user\n<|im_end|><|endoftext|>",
    "x = {'a': [1, 23, 456789]} # 3.14159e-10",
    "I'll we've CAN'T don't",
    "\u00a0nbsp\u200bzero\ufeffbom \ufffd \x00 nul",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]
REAL = ["tokenizers/Qwen2.5-Instruct", "tokenizers/SmolLM2-135M", "models/stories260K/hf-llama"]


@pytest.mark.parametrize("name", REAL)
def test_ids_and_texts_equal_transformers(name: str, asset: Callable[[str], Path]) -> None:
    from transformers import PreTrainedTokenizerFast

    directory = asset(name)
    ours = Tokenizer.load(directory)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(directory))
    for text in AWKWARD:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids, text
            with_offsets, offsets = ours.encode_with_offsets(text, add_special_tokens=special)
            assert with_offsets == ids
            assert len(offsets) == len(ids)
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    assert ours.chat_template == theirs.chat_template


def test_special_tokens_of_real_directories(qwen: Tokenizer, stories: Tokenizer) -> None:
    assert (qwen.bos_id, qwen.eos_id) == (None, 151645)  # an explicit null: Qwen2.5 has no BOS
    assert qwen.stop_ids == {151645}
    assert (stories.bos_id, stories.eos_id, stories.stop_ids) == (1, 2, {2})
    assert stories.chat_template is None


@pytest.mark.parametrize("name", REAL)
def test_stream_equals_decoding_at_once(name: str, asset: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.load(asset(name))
    rng = random.Random(0)
    cases = [tokenizer.encode(text) for text in AWKWARD]
    # Random ids make broken characters, runs of byte tokens and leading spaces.
    # Ids beyond the vocabulary, which a padded model can choose, have no text at all.
    for size in (2, 300, tokenizer.vocab_size, tokenizer.vocab_size * 2):
        cases += [[rng.randrange(size) for _ in range(rng.randint(0, 25))] for _ in range(60)]
    for ids in cases:
        for skip in (True, False):
            decoder = StreamDecoder(tokenizer, skip)
            text = "".join([decoder.push(i) for i in ids]) + decoder.finish()
            assert text == tokenizer.decode(ids, skip), ids


def test_stream_gives_no_part_of_a_character(qwen: Tokenizer, stories: Tokenizer) -> None:
    for tokenizer in (qwen, stories):
        text = "I see 漢 and 👩🏽‍🚀 now"
        pieces = list(decode_stream(tokenizer, tokenizer.encode(text)))
        assert "".join(pieces) == text
        assert len(pieces) > 5, "text must come while it is generated, not at the end"
        assert not any("\ufffd" in piece for piece in pieces)


def test_stream_keeps_what_stays_broken(tiny: Tokenizer) -> None:
    ids = tiny.encode("a漢")
    decoder = StreamDecoder(tiny)
    assert [decoder.push(i) for i in ids[:-1]] == ["a", "", ""]
    assert decoder.finish() == "\ufffd"


def test_directory_without_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no tokenizer.json.*--tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    (tmp_path / "vocab.json").touch()
    with pytest.raises(ModelError, match=r"holds tokenizer.model, vocab.json but no tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ModelError, match="is not a directory"):
        Tokenizer.load(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["", "{", "{}", '{"model": 1}', "\x00\x01"])
def test_corrupt_tokenizer_json(text: str, tiny_directory: Path) -> None:
    (tiny_directory / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"tokenizer.json is not a tokenizer that can be read"):
        Tokenizer.load(tiny_directory)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", "[1]", "expected a JSON object"),
        ("tokenizer_config.json", '{"eos_token": "<end>"}', "eos_token is '<end>', which"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is a int"),
        ("tokenizer_config.json", '{"chat_template": []}', "none is named 'default'"),
        ("generation_config.json", '{"eos', "generation_config.json is not valid JSON"),
    ],
)
def test_corrupt_files_beside_it(name: str, text: str, message: str, tiny_directory: Path) -> None:
    (tiny_directory / name).write_text(text)
    with pytest.raises(ModelError, match=message):
        Tokenizer.load(tiny_directory)


def test_which_file_is_believed(tiny_directory: Path) -> None:
    def write(name: str, value: object) -> None:
        (tiny_directory / name).write_text(json.dumps(value))

    write("generation_config.json", {"eos_token_id": [3, 4]})
    write("config.json", {"bos_token_id": 7, "eos_token_id": 5})
    tokenizer = Tokenizer.load(tiny_directory)
    eos = tokenizer.encode("<eos>")[0]
    assert tokenizer.eos_id == eos
    assert tokenizer.bos_id is None
    end_of_turn = tokenizer.encode("<|im_end|>")[0]  # no file names it; the template writes it
    assert tokenizer.stop_ids == {3, 4, 5, eos, end_of_turn}
    assert Tokenizer.load(tiny_directory, "none").stop_ids == {3, 4, 5, eos}

    write("tokenizer_config.json", {})
    write("special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}})
    tokenizer = Tokenizer.load(tiny_directory)
    assert tokenizer.eos_id == tokenizer.encode("<|im_end|>")[0]
    assert tokenizer.bos_id == 7

    (tiny_directory / "special_tokens_map.json").unlink()
    assert Tokenizer.load(tiny_directory).eos_id == 3


def test_chat_templates_come_from_three_places(tiny_directory: Path, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tiny_directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.load(tiny_directory).chat_template == "D"
    (tiny_directory / "chat_template.jinja").write_text("J")
    assert Tokenizer.load(tiny_directory).chat_template == "J"
    given = tmp_path / "given.jinja"
    given.write_text("G")
    assert Tokenizer.load(tiny_directory, str(given)).render_chat([]) == "G"
    without = Tokenizer.load(tiny_directory, "none")
    assert without.chat_template is None
    with pytest.raises(DataError, match="--chat-template FILE"):
        without.render_chat([])
    with pytest.raises(ConfigError, match=r"cannot read the chat template .*No such file"):
        Tokenizer.load(tiny_directory, str(tmp_path / "no.jinja"))


def test_tokens_that_only_the_config_lists(tiny_directory: Path) -> None:
    path = tiny_directory / "tokenizer_config.json"
    entry = {"content": "<extra>", "special": True}
    path.write_text(json.dumps({"added_tokens_decoder": {"259": entry}, "eos_token": "<extra>"}))
    assert Tokenizer.load(tiny_directory).eos_id == 259
    path.write_text(json.dumps({"added_tokens_decoder": {"900": entry}}))
    with pytest.raises(ModelError, match=r"the id 900, but tokenizer.json leaves it 259"):
        Tokenizer.load(tiny_directory)


def test_half_a_surrogate_pair(tiny: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"character 3 is \\ud83d, half of a surrogate pair"):
        tiny.encode("ab\ud83d")


def test_truncation_and_padding_are_off(tiny_directory: Path) -> None:
    from tokenizers import Tokenizer as Backend

    path = str(tiny_directory / "tokenizer.json")
    backend = Backend.from_file(path)
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(path)
    assert len(Tokenizer.load(tiny_directory).encode("abcdef")) == 6
    assert len(Tokenizer.load(tiny_directory).encode("a")) == 1


def test_importing_the_room_is_light(bare_room: str) -> None:
    modules = "cache, encode, files, formats, prepare, templates, tokenizer"
    code = (
        f"{bare_room}from lowtide.data import {modules}; "
        "print([m for m in ('tokenizers', 'jinja2', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
