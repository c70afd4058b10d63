"""Tokenizer files, chat templates, records, settings files and token caches that are wrong."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st
from judging import QUICK, Judge, fuzz
from mutate import broken, documents, texts
from small import CHATML, write_small_tokenizer

from lowtide.config import build, given_values, parser_for
from lowtide.data.cache import CacheWriter, TokenDataset
from lowtide.data.encode import Encoder
from lowtide.data.formats import iter_records
from lowtide.data.tokenizer import Tokenizer
from lowtide.data.turns import template_traits
from lowtide.train.settings import TrainSettings

AWKWARD = "Grüße <s>  <|im_end|>\n\t🌧 漢字 a\u0301"
BPE: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, text in enumerate(("<unk>", "<s>", "</s>"))
    ],
    "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]},
    "pre_tokenizer": None,
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    },
    "decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]},
    "model": {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
        "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3, "a": 4, "b": 5, "\u2581a": 6},
        "merges": [["\u2581", "a"]],
    },
}  # fmt: skip
TOKENIZER_FILES: dict[str, Any] = {
    "tokenizer.json": BPE,
    "tokenizer_config.json": {
        "added_tokens_decoder": {
            "1": {"content": "<s>", "lstrip": False, "special": True},
            "2": {"content": "</s>", "special": True},
        },
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "additional_special_tokens": ["<x>"],
        "chat_template": [{"name": "default", "template": CHATML}],
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
    },
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
    "added_tokens.json": {"<pad>": 7},
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2]},
    "config.json": {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2},
}
NAMES = (
    *("extra_special_tokens", "pad_token", "image_token", "split_special_tokens", "chat_template"),
    *("type", "pattern", "Regex", "String", "dropout", "merges", "vocab", "add_prefix_space"),
)


def _tokenizer(data: st.DataObject, judge: Judge, tmp_path: Path) -> None:
    changed = data.draw(st.sampled_from((*TOKENIZER_FILES, "tokenizer.json")))
    for name, good in TOKENIZER_FILES.items():
        raw = data.draw(texts(good, NAMES)) if name == changed else json.dumps(good).encode()
        (tmp_path / name).write_bytes(raw)

    def use() -> None:
        tokenizer = Tokenizer.load(tmp_path)
        ids, offsets = tokenizer.encode_document(AWKWARD)
        assert len(ids) == len(offsets)
        assert isinstance(tokenizer.decode(ids), str)
        tokenizer.mismatch(8)
        if tokenizer.template is not None:
            template_traits(tokenizer.template)
            tokenizer.render_chat([{"role": "user", "content": "a"}], True)

    judge(use)


test_tokenizers, test_many_tokenizers = fuzz(_tokenizer, st.data(), QUICK * 2, 4_000)


ROWS: list[list[Any]] = [
    [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "a?"},
                {"role": "assistant", "content": "b."},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "chat_template_kwargs": {"enable_thinking": False},
        },
        {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
    ],
    [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}],
    [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "c", "output": "d"}],
    [{"text": "some text"}, {"text": "more"}],
]
TURN = ("role", "content", "tool_calls", "reasoning_content", "weight", "name")


@st.composite
def records(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file's name and bytes: JSON Lines, or a list in a .json."""
    rows = draw(documents(draw(st.sampled_from(ROWS)), TURN))
    if draw(st.integers(0, 3)) == 0 or not isinstance(rows, list):
        raw = json.dumps(rows).encode("utf-8", "surrogatepass")
        return "data.json", draw(broken(raw))
    lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in rows]
    raw = draw(st.sampled_from(("\n", "\r\n", "\n\n"))).join(lines).encode("utf-8", "surrogatepass")
    return "data.jsonl", draw(broken(raw))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[Encoder]:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_small_tokenizer(directory)
    tokenizer = Tokenizer.load(directory)
    return [Encoder(tokenizer, 64, 264, mask_prompt) for mask_prompt in (False, True)]


def _records(
    drawn: tuple[tuple[str, bytes], bool], judge: Judge, tmp_path: Path, encoders: list[Encoder]
) -> None:
    (name, content), mask = drawn
    path = tmp_path / name
    path.write_bytes(content)

    def use() -> None:
        for record in iter_records(path):
            encoded = encoders[mask].encode(record)
            assert len(encoded.ids) == len(encoded.trained) <= 64

    judge(use)


test_records, test_many_records = fuzz(
    _records, st.tuples(records(), st.booleans()), QUICK * 4, 30_000
)


PARSER = parser_for(TrainSettings, "lowtide train", "")
SETTINGS: dict[str, Any] = {
    "model": "some/model",
    "data": "data",
    "adapter_path": "out",
    "iters": 3,
    "learning-rate": 1e-4,
    "lora_r": 8,
    "target_modules": ["q_proj", "v_proj"],
    "mask_prompt": True,
    "max_seq_length": 64,
    "memory_budget": "400MB",
    "optimizer": "adamw",
}


def _nine(line: str, first: str) -> str:
    """`first`, and nine lines of which each stands for nine of the one before."""
    names = "abcdefghij"
    return first + "".join(
        line.format(name, ", ".join([f"*{before}"] * 9)) + "\n" for before, name in pairwise(names)
    )


LAUGHS = _nine("{0}: &{0} [{1}]", "a: &a [x, x]\n")
MERGES = _nine("{0}: &{0} {{<<: [{1}]}}", "a: &a {k: 1}\n")
NASTY = (
    *(LAUGHS, LAUGHS + "model: *j\n", MERGES, "model: &m [*m]", "&x model: *x", "<<: {iters: 1}"),
    *("!!python/object/apply:os.system ['true']", "model: !!python/name:os.system", "<<: [1]"),
    *("? [a]\n: b\n", "model: 2001-01-01", "model: !!binary aGk=", "%YAML 9.9\n---\nmodel: x"),
    *("\tmodel: x", "---\nmodel: a\n---\nmodel: b", "model: !!set {a, b}", "iters: 1_000"),
    *("iters: 0o17", "iters: .inf", "iters: .nan", "iters: 1:30", "model: ~", "json: true"),
    *("{" * 3000, "[" * 3000, "- " * 3000, "? {a: 1}\n: 2", "true: 1\n1: 2\nnull: 3\n1.5: 4"),
    *("model: |\n  a\n b", "\x00", "\ufeffmodel: x", "model: a\nmodel: b", "iters: 3\niters: 4"),
    *("config: x.yaml", "model: 'a", "iters: " + "9" * 5000, "learning_rate: 1e999", "*a", "!x"),
    *('model: "\\ud800"', "'a\\0': 1"),
)


@st.composite
def settings_files(draw: st.DrawFn) -> bytes:
    """YAML: changed settings in block or flow style, with something nasty after it or alone."""
    kind = draw(st.sampled_from(("json", "block", "nasty", "both")))
    nasty = draw(st.sampled_from(NASTY)).encode("utf-8", "surrogatepass")
    if kind == "nasty":
        return draw(broken(nasty))
    if kind == "json":
        return draw(texts(SETTINGS, tuple(SETTINGS)))
    document = draw(documents(SETTINGS, tuple(SETTINGS)))
    text = yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass")
    return draw(broken(text + (b"\n" + nasty if kind == "both" else b"")))


def _settings(raw: bytes, judge: Judge, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(raw)
    parsed = PARSER.parse_strictly(["--config", str(tmp_path / "run.yaml")])
    judge(lambda: build(TrainSettings, given_values(parsed)))


test_settings_files, test_many_settings_files = fuzz(_settings, settings_files(), QUICK, 3_000)


@pytest.mark.parametrize("text", NASTY)
def test_each_nasty_settings_file(text: str, judge: Judge, tmp_path: Path) -> None:
    _settings(text.encode("utf-8", "surrogatepass"), judge, tmp_path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("cache") / "train.safetensors"
    with CacheWriter(path) as writer:
        for i in range(5):
            writer.append(list(range(3 + i)), [1] * (3 + i), i)
        writer.commit()
    return path.read_bytes()


def _cache(data: st.DataObject, judge: Judge, tmp_path: Path, cache: bytes) -> None:
    path = tmp_path / "train.safetensors"
    header, tail = json.loads(cache[8:512]), cache[512:]
    if data.draw(st.booleans()):
        header = data.draw(documents(header))
    text = json.dumps(header).encode("utf-8", "surrogatepass").ljust(504)
    numbers = bytearray(data.draw(broken(tail)))
    if len(numbers) > 8 and data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(numbers) - 8))
        wrong = data.draw(st.sampled_from((-1, 0, 2**31, 2**62, -(2**63))))
        numbers[place : place + 8] = struct.pack("<q", wrong)
    path.write_bytes(cache[:8] + text + bytes(numbers))

    def use() -> None:
        dataset = TokenDataset.open(path)
        for i in range(min(len(dataset), 50)):
            ids, labels = dataset.sequence(i)
            assert len(ids) == len(labels)

    judge(use)


test_token_caches, test_many_token_caches = fuzz(_cache, st.data(), QUICK, 8_000)
