"""Files that are never held whole: the same records and tokens, and memory that does not grow."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowtide.data import files, json_list, stream, text
from lowtide.data.formats import iter_records
from lowtide.data.json_list import iter_list
from lowtide.data.stream import stream_ids
from lowtide.data.text import iter_plain
from lowtide.data.tokenizer import Tokenizer
from lowtide.errors import DataError


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_SEGMENT", 600)
    monkeypatch.setattr(stream, "_CONTEXT", 100)
    monkeypatch.setattr(stream, "_AGREE", 40)


def streamed(tokenizer: Tokenizer, whole: str, piece: int = 97) -> list[list[int]]:
    pieces = (whole[i : i + piece] for i in range(0, len(whole), piece))
    return list(stream_ids(tokenizer, pieces))


AWKWARD = [
    "a" * 5000,
    "ab" * 3000,
    "é" * 4000,
    "\n" * 3000,
    " " * 3000 + "x",
    "😀🏽" * 1500,
    "<s>" * 900,
    ("x" * 700 + " ") * 9,
    "word " * 2000,
    "1234567890" * 500,
    "".join(chr(0x4E00 + i * 7 % 20000) for i in range(4000)),
    "e\u0301" * 2500,
    "a",
    "",
]


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("name", ["stories", "qwen", "tiny"])
def test_streamed_tokens_are_those_of_the_whole_text(
    name: str, asset: Callable[[str], Path], request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    book = asset("data/wizard_of_oz/wizard_of_oz.txt").read_text(encoding="utf-8")[:60_000]
    for whole in (book, *AWKWARD, "".join(AWKWARD)):
        parts = streamed(tokenizer, whole)
        assert [i for part in parts for i in part] == tokenizer.encode_document(whole)[0]
    assert len(streamed(tokenizer, book)) > 50, "it was not taken as one"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b ", "é", "\n", "ly", "<s>", "😀", " the"]),
                          st.integers(1, 400)), min_size=1, max_size=20))  # fmt: skip
def test_streamed_tokens_of_runs(stories: Tokenizer, runs: list[tuple[str, int]]) -> None:
    whole = "".join(part * count for part, count in runs)
    with pytest.MonkeyPatch.context() as patch:
        for setting, value in (("_SEGMENT", 400), ("_CONTEXT", 60), ("_AGREE", 24)):
            patch.setattr(stream, setting, value)
        parts = streamed(stories, whole)
    assert [i for part in parts for i in part] == stories.encode_document(whole)[0]


def test_a_long_text_is_tokenised_a_part_at_a_time(stories: Tokenizer, tmp_path: Path) -> None:
    longest = 0
    real = stories.encode_document

    def watched(whole: str) -> Any:
        nonlocal longest
        longest = max(longest, len(whole))
        return real(whole)

    path = tmp_path / "long.txt"
    path.write_text("It was a dark night, and nobody saw the cat.\n" * 40_000)
    stories.encode_document = watched  # type: ignore[method-assign]
    try:
        count = sum(len(part) for part in stream_ids(stories, iter_plain(path)))
    finally:
        del stories.encode_document  # type: ignore[method-assign]
    assert count > 400_000
    assert longest < 3 * stream._SEGMENT < path.stat().st_size


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(JSON_VALUES, max_size=6), st.integers(0, 2), st.integers(1, 9), st.data())
def test_a_list_in_pieces_is_what_json_reads(
    rows: list[Any], indent: int, piece: int, data: st.DataObject
) -> None:
    """And where a character is missing, both refuse, at the same place."""
    whole = json.dumps(rows, indent=indent or None, ensure_ascii=False)
    at = data.draw(st.integers(0, len(whole)))
    for content in (whole, whole[:at] + whole[at + 1 :], whole[:at]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_list, "iter_text", lambda path, c=content: _pieces(c, piece))
            try:
                ours: Any = list(iter_list(Path("f.json")))
            except DataError as error:
                ours = str(error)
        truth, refusal = _json(content)
        if refusal is None:
            assert ours == truth if isinstance(truth, list) else "expected a JSON list" in ours
            continue
        assert isinstance(ours, str), content
        if "is not valid JSON" in ours and "array" not in refusal.msg:
            assert f"column {refusal.colno})" in ours, (content, ours, refusal)


def _json(content: str) -> tuple[Any, json.JSONDecodeError | None]:
    try:
        return json.loads(content), None
    except json.JSONDecodeError as refusal:
        return None, refusal


def _pieces(content: str, size: int) -> Iterator[str]:
    yield from (content[i : i + size] for i in range(0, len(content), size))


def test_where_a_list_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    good = ",\n".join(json.dumps({"text": "x" * 100}) for _ in range(9000))
    for ending, message in (
        ('{"text": }]', r"Expecting value \(line 9001, column 10\)"),
        ('{"text": "a"} {"text": "b"}]', r"Expecting ',' delimiter \(line 9001, column 15\)"),
        ('{"text": "a"', r"Expecting ',' delimiter \(line 9001, column 13\)"),
        ('{"text": "a', r"Unterminated string starting at \(line 9001, column 10\)"),
        ('{"text": "\0"}]', r"Invalid control character at \(line 9001, column 11\)"),
    ):
        path.write_text(f"[{good},\n{ending}")
        with pytest.raises(DataError, match=message):
            list(iter_list(path))


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_reading_holds_one_record(tmp_path: Path, suffix: str) -> None:
    rows = [json.dumps({"text": "x" * 1000, "n": n}) for n in range(20_000)]
    path = tmp_path / f"d.{suffix}"
    path.write_text("\n".join(rows) if suffix == "jsonl" else f"[{','.join(rows)}]")
    del rows
    tracemalloc.start()
    assert sum(1 for _ in iter_records(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * text.PIECE_BYTES + 1_000_000 < path.stat().st_size / 8


def test_a_line_without_end_is_not_held(tmp_path: Path) -> None:
    """1 GB of spaces, in a file that takes no disk: zeros are NUL bytes."""
    path = tmp_path / "d.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        file.truncate(1_000_000_000)
        file.seek(1_000_000_000)
        file.write(b'"}\n{"text": "b"}\n{"text"')
    tracemalloc.start()
    with pytest.raises(DataError) as caught:
        list(iter_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    said = str(caught.value)
    assert "line 2: it is 1,000.0 MB long, and a record may have 16.8 MB. Expected one" in said
    assert "line 4: not valid JSON" in said
    assert "the file ends within this line, so it may have been cut off" in said
    assert peak < 5 * files.LINE_BYTES


def test_a_value_without_end_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "RECORD_CHARS", 1_000_000)
    path = tmp_path / "d.json"
    path.write_text('[{"text": "a"}, {"text": "' + "x" * 3_000_000)
    with pytest.raises(DataError, match=r"d\.json, record 2: it is not closed within 1 million"):
        list(iter_list(path))


def test_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    for raw, message in (
        (b"a\n" * 200_000 + b"\0", "holds a NUL byte on line 200001: it is no text, or was not"),
        (b"\xc3\xa9" * 150_000 + b"\n\xc3", "is not UTF-8: byte 0xc3 on line 2. Save it as UTF-8"),
        (b"\xff\xfea\0", "is UTF-16"),
        (b"\xef\xbb\xbf", "is empty"),
    ):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=message):
            list(iter_plain(path))
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + bytes(40) + b"\n")
    with pytest.raises(
        DataError, match=r"line 2: not valid JSON: .*; it holds NUL bytes, as files"
    ):
        list(iter_records(path))
    folder = tmp_path / "folder"
    (folder / "train.jsonl").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train\.jsonl is a directory\. Expected a \.jsonl"):
        files.require_split(folder, ("train",))


def test_characters_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE_BYTES", 3)
    path = tmp_path / "d.txt"
    whole = "é😀中\r\n" * 7
    path.write_bytes(b"\xef\xbb\xbf" + whole.encode())
    assert "".join(iter_plain(path)) == whole
