"""Tokenizers into GGUF metadata and back, against the original ones and against llama.cpp.

The texts and the kinds of tokenizers are those of test_family_tokenizers.py; real ones lie beside
the repository.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from gguf_tokens import GOLDEN, KINDS, digest, digest_of_ids, llama_cpp_ids, metadata_of
from small import write_small_tokenizer
from test_family_tokenizers import AWKWARD, SPECIALS
from tiny_tokenizer import write_tiny

from lowtide.data.gguf_tokenizer import PIPELINE_KEY, tokenizer_files
from lowtide.data.gguf_vocabulary import merges_by_score
from lowtide.data.pre_tokenizers import PRE_TOKENIZERS, name_of
from lowtide.data.tokenizer import Tokenizer
from lowtide.errors import ModelError
from lowtide.export.gguf_tokenizer import tokenizer_metadata

ASSETS = Path(__file__).parents[2].parent / "shared" / "assets"
REAL = {
    "qwen2.5": ASSETS / "tokenizers" / "Qwen2.5-Instruct",
    "smollm2": ASSETS / "tokenizers" / "SmolLM2-135M",
    "stories260k": ASSETS / "models" / "stories260K" / "hf-llama",
}
RECORDED = json.loads(GOLDEN.read_text(encoding="utf-8"))
_SPACES = {" ", "  ", "   leading", " \n \n ", " " * 500 + "x" + "\n" * 300}
_SPACES |= {text for text in AWKWARD if text.startswith(("  two spaces", "▁lower"))}
_UNCOMPOSED = {text for text in AWKWARD if "\u0301" in text}
WITHOUT_OUR_KEY = {
    "llama2-legacy-False": {*_SPACES, SPECIALS},
    "llama2-legacy-True": {*_SPACES, SPECIALS},
    "tinyllama": {*_SPACES, SPECIALS},
    "phi3": {SPECIALS},
}
"""Texts that only `lowtide.tokenizer` tells apart: GGUF has no word for where a space goes."""
LLAMA_CPP_DIFFERS = {
    **WITHOUT_OUR_KEY,
    # It does not compose accents.
    "qwen2": _UNCOMPOSED,
    "qwen3": _UNCOMPOSED,
}
"""Texts that llama.cpp reads in another way than the model's own tokenizer."""


def write_tokenizer(metadata: dict[str, Any], directory: Path) -> None:
    for name, held in tokenizer_files(metadata).items():
        (directory / name).write_text(json.dumps(held))


def back(metadata: dict[str, Any], directory: Path) -> Tokenizer:
    directory.mkdir()
    write_tokenizer(metadata, directory)
    return Tokenizer.load(directory)


def assert_same(ours: Tokenizer, truth: Tokenizer, but: set[str] | None = None) -> None:
    differing = {text for text in AWKWARD if ours.encode(text) != truth.encode(text)}
    assert differing == (but or set())
    for text in AWKWARD:
        ids = truth.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == truth.decode(ids, skip)
    for name in ("bos_id", "eos_id", "vocab_size", "stop_ids", "special_ids", "chat_template"):
        assert getattr(ours, name) == getattr(truth, name), name


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_come_back(name: str, tmp_path: Path) -> None:
    if not REAL[name].is_dir():
        pytest.skip(f"{REAL[name]} is not there")
    truth = Tokenizer.load(REAL[name])
    metadata = tokenizer_metadata(REAL[name], truth.vocab_size + 64)
    assert_same(back(metadata, tmp_path / "keyed"), truth)
    del metadata[PIPELINE_KEY]  # as in a file that somebody else wrote
    assert_same(back(metadata, tmp_path / "plain"), truth)


def test_scores_alone_give_the_merges(tmp_path: Path) -> None:
    """Files of others hold no merges of a SentencePiece model."""
    if not REAL["stories260k"].is_dir():
        pytest.skip(f"{REAL['stories260k']} is not there")
    truth = Tokenizer.load(REAL["stories260k"])
    metadata = tokenizer_metadata(REAL["stories260k"], truth.vocab_size)
    del metadata[PIPELINE_KEY], metadata["tokenizer.ggml.merges"]
    assert_same(back(metadata, tmp_path / "scores"), truth)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_comes_back(name: str, tmp_path: Path) -> None:
    metadata = metadata_of(name, tmp_path)
    truth = Tokenizer.load(tmp_path / name)
    assert_same(back(metadata, tmp_path / "keyed"), truth)
    del metadata[PIPELINE_KEY]
    assert_same(back(metadata, tmp_path / "plain"), truth, WITHOUT_OUR_KEY.get(name))


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_those_that_llama_cpp_gave(name: str, tmp_path: Path) -> None:
    """From the same metadata, but for what is known to differ.

    White space of Gemma's kind is left out: llama.cpp takes tokens of spaces before it merges, and
    this vocabulary, trained on a few lines, does not have the merges that the family's own has.
    """
    metadata = metadata_of(name, tmp_path)
    hashed, *ids = RECORDED[name]
    assert digest(metadata) == hashed
    truth = Tokenizer.load(tmp_path / name)
    differing = {
        text
        for text, one in zip(AWKWARD, ids, strict=True)
        if digest_of_ids(truth.encode(text)) != one
    }
    if name.startswith("gemma"):
        assert all("  " in text or "\n\n" in text or "▁▁" in text for text in differing)
    else:
        assert differing == LLAMA_CPP_DIFFERS.get(name, set())


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_llama_cpp_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    found = llama_cpp_ids(metadata_of(name, tmp_path), tmp_path / "model.gguf")
    assert [digest_of_ids(ids) for ids in found] == RECORDED[name][1:]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_llama_cpp_reads_real_tokenizers(name: str, tmp_path: Path) -> None:
    """It takes `</s>` for an end of text wherever a vocabulary holds those letters as a piece."""
    truth = Tokenizer.load(REAL[name])
    metadata = tokenizer_metadata(REAL[name], truth.vocab_size)
    found = llama_cpp_ids(metadata, tmp_path / "model.gguf")
    differing = {
        text for text, ids in zip(AWKWARD, found, strict=True) if ids != truth.encode(text)
    }
    assert differing == ({*_UNCOMPOSED, SPECIALS} if name == "qwen2.5" else set())


def test_a_vocabulary_of_single_bytes(tmp_path: Path) -> None:
    write_small_tokenizer(tmp_path)
    truth = Tokenizer.load(tmp_path)
    metadata = tokenizer_metadata(tmp_path, truth.vocab_size)
    del metadata[PIPELINE_KEY]
    assert_same(back(metadata, tmp_path / "back"), truth)


@pytest.mark.slow
def test_llama_cpp_reads_a_vocabulary_of_single_bytes(tmp_path: Path) -> None:
    write_small_tokenizer(tmp_path)
    truth = Tokenizer.load(tmp_path)
    metadata = tokenizer_metadata(tmp_path, truth.vocab_size)
    found = llama_cpp_ids(metadata, tmp_path / "model.gguf")
    assert found == [truth.encode(text) for text in AWKWARD]


@pytest.mark.slow
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_llama_cpp_cuts_as_the_named_pre_tokenizer(pre: str, tmp_path: Path) -> None:
    """Every name of the table, with one vocabulary."""
    metadata = metadata_of("llama3", tmp_path)
    del metadata[PIPELINE_KEY], metadata["tokenizer.ggml.add_bos_token"]
    metadata["tokenizer.ggml.pre"] = pre
    ours = back(metadata, tmp_path / "back")
    found = llama_cpp_ids(metadata, tmp_path / "model.gguf")
    differing = {text for text, ids in zip(AWKWARD, found, strict=True) if ids != ours.encode(text)}
    assert differing <= (_UNCOMPOSED if PRE_TOKENIZERS[pre].normalizer else set())


@pytest.fixture
def metadata(tmp_path: Path) -> dict[str, Any]:
    found = metadata_of("smollm2", tmp_path)
    del found[PIPELINE_KEY]
    return found


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model", None, "holds no tokenizer (tokenizer.ggml.model is missing)"),
        ("model", "none", "holds no tokenizer (tokenizer.ggml.model is 'none')"),
        ("model", "bert", "is of kind 'bert' (tokenizer.ggml.model); lowtide reads 'llama' and"),
        ("pre", None, "(tokenizer.ggml.pre) is missing, and lowtide knows gpt-2,"),
        ("pre", "klingon", "(tokenizer.ggml.pre) is 'klingon', and lowtide knows gpt-2,"),
        ("tokens", None, "lacks tokenizer.ggml.tokens"),
        ("tokens", [1, 2], "tokenizer.ggml.tokens holds what is no text"),
        ("token_type", [1], "and 1 types of them (tokenizer.ggml.token_type)"),
        ("merges", None, "lacks tokenizer.ggml.merges"),
        ("merges", ["ab"], "merges 'ab', of which it does not hold both parts"),
        ("merges", ["zq zq"], "merges 'zq zq', of which it does not hold both parts"),
        ("eos_token_id", 99_999, "tokenizer.ggml.eos_token_id is 99999, and it has"),
        ("bos_token_id", "one", "tokenizer.ggml.bos_token_id is 'one', and it has"),
    ],
)
def test_what_cannot_be_read_is_named(
    key: str, value: Any, said: str, metadata: dict[str, Any], tmp_path: Path
) -> None:
    metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(ModelError) as caught:
        write_tokenizer({k: v for k, v in metadata.items() if v is not None}, tmp_path)
    assert said in str(caught.value)
    assert "with --tokenizer DIR" in str(caught.value)
    assert not (tmp_path / "tokenizer.json").exists()


def test_pieces_need_scores(tmp_path: Path) -> None:
    found = metadata_of("mistral", tmp_path)
    del found[PIPELINE_KEY], found["tokenizer.ggml.merges"]
    found["tokenizer.ggml.scores"] = found["tokenizer.ggml.scores"][:5]
    with pytest.raises(ModelError, match=r"and 5 scores of them \(tokenizer\.ggml\.scores\)"):
        write_tokenizer(found, tmp_path)


@pytest.mark.parametrize("key", [PIPELINE_KEY, "tokenizer.huggingface.json"])
def test_json_in_the_metadata_that_is_none(
    key: str, metadata: dict[str, Any], tmp_path: Path
) -> None:
    for text in ("{", "[]", '{"model": 1}'):
        with pytest.raises(ModelError, match=r"is not a tokenizer\.json"):
            write_tokenizer({**metadata, key: text}, tmp_path)


def test_a_tokenizer_json_in_the_file_is_taken(metadata: dict[str, Any], tmp_path: Path) -> None:
    text = (tmp_path / "smollm2" / "tokenizer.json").read_text(encoding="utf-8")
    metadata = {**metadata, "tokenizer.huggingface.json": text, "tokenizer.ggml.pre": "klingon"}
    assert_same(back(metadata, tmp_path / "back"), Tokenizer.load(tmp_path / "smollm2"))


def test_templates_with_names_and_further_ends(metadata: dict[str, Any], tmp_path: Path) -> None:
    template = metadata["tokenizer.chat_template"]
    metadata["tokenizer.chat_template.tool_use"] = "{{ 'tools' }}"
    metadata["tokenizer.ggml.eot_token_id"] = 5
    ours = back(metadata, tmp_path / "back")
    assert ours.chat_template == template
    assert ours.render_chat([{"role": "user", "content": "a"}], tools=[{}]) == "tools"
    assert {ours.eos_id, 5} <= ours.stop_ids


def test_a_tokenizer_that_the_model_has_no_rows_for(tmp_path: Path) -> None:
    KINDS["smollm2"].write(tmp_path / "d")
    with pytest.raises(ModelError, match=r"has 42\d tokens and the model 200 \(vocab_size in conf"):
        tokenizer_metadata(tmp_path / "d", 200)


def test_a_pre_tokenizer_without_a_name_is_refused(tmp_path: Path) -> None:
    """This one cuts at nothing."""
    write_tiny(tmp_path / "tiny", None)
    with pytest.raises(ModelError) as caught:
        tokenizer_metadata(tmp_path / "tiny", 300)
    assert "cuts texts in a way that llama.cpp has no name for" in str(caught.value)
    assert '"use_regex": false' in str(caught.value)


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer: .* holds no tokenizer\.json"):
        tokenizer_metadata(tmp_path, 100)


def test_every_name_is_found_again() -> None:
    for pre in PRE_TOKENIZERS.values():
        form = None if pre.normalizer is None else {"type": pre.normalizer}
        model = {"ignore_merges": pre.whole_words}
        state = {"pre_tokenizer": pre.stages(), "normalizer": form, "model": model}
        name = name_of(state)
        assert name is not None
        found = PRE_TOKENIZERS[name]
        assert (found.pattern, found.digits, found.normalizer) == (
            pre.pattern, pre.digits, pre.normalizer,
        )  # fmt: skip
        assert name_of({**state, "normalizer": {"type": "Lowercase"}}) is None


def test_merges_of_scores_are_transformers() -> None:
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = ["a", "b", "ab", "ba", "aba", "abab", "bab", "aa", "aaa", "aaaa"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    scores = [0.0, 0.0, -3.0, -1.0, -1.0, -7.0, -2.0, -5.0, -5.0, -4.0]
    theirs = generate_merges(ids, dict(zip(pieces, scores, strict=True)))
    assert merges_by_score(ids, scores) == [list(merge[:2]) for merge in theirs]


ODD = (True, "x", 2.5, [], ["a"], {"a": 1})


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_odd_values_are_read_or_refused(name: str, tmp_path: Path) -> None:
    """Every key with every odd value: a tokenizer or a `ModelError`, when written or loaded."""
    metadata = metadata_of(name, tmp_path)
    plain = {key: value for key, value in metadata.items() if key != PIPELINE_KEY}
    extra = ("tokenizer.chat_template.x", "tokenizer.ggml.eot_token_id", "general.architecture")
    for key in (*plain, *extra, "tokenizer.huggingface.json", PIPELINE_KEY):
        for value in ODD:
            with contextlib.suppress(ModelError):
                write_tokenizer({**plain, key: value}, tmp_path)
                Tokenizer.load(tmp_path).encode("a b")
