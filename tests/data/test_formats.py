"""Every format is read; everything that is wrong with a file is named with its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowtide.data.files import require_split, resolve_split
from lowtide.data.formats import (
    ChatRecord,
    FeatureNames,
    InstructionRecord,
    PromptRecord,
    TextRecord,
    iter_records,
)
from lowtide.data.text import iter_plain
from lowtide.errors import DataError

USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind."}
TOOL = {"role": "tool", "content": "3"}


def jsonl(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def problems(path: Path, names: FeatureNames | None = None) -> str:
    with pytest.raises(DataError) as caught:
        list(iter_records(path, names))
    return str(caught.value)


def test_each_format(tmp_path: Path) -> None:
    where = f"{tmp_path / 'train.jsonl'}, line 1"

    def first(row: Any, names: FeatureNames | None = None) -> Any:
        (record,) = iter_records(jsonl(tmp_path, row), names)
        return record

    chat = [SYSTEM, USER, BOT]
    assert first({"messages": chat}) == ChatRecord(where, chat)
    assert first({"prompt": "a", "completion": "b"}) == PromptRecord(where, "a", "b")
    assert first({"question": "a", "answer": "b"}) == PromptRecord(where, "a", "b")
    assert first({"text": "a"}) == TextRecord(where, "a")
    alpaca = {"instruction": "a", "output": "b"}
    assert first(alpaca) == InstructionRecord(where, "a", "", "b")
    assert first({**alpaca, "input": None}) == InstructionRecord(where, "a", "", "b")
    assert first({**alpaca, "input": "c", "text": "x"}) == InstructionRecord(where, "a", "c", "b")
    names = FeatureNames(prompt="q", completion="a", text="body", chat="turns")
    assert first({"q": "1", "a": "2"}, names) == PromptRecord(where, "1", "2")
    assert first({"body": "1"}, names) == TextRecord(where, "1")
    assert first({"turns": [USER, BOT]}, names) == ChatRecord(where, [USER, BOT])
    tools = [{"type": "function"}]
    assert first({"messages": [USER, BOT], "tools": tools}).tools == tools


def test_real_files(asset: Callable[[str], Path]) -> None:
    gsm8k = list(iter_records(asset("data/gsm8k/train.jsonl")))
    assert len(gsm8k) == 7473
    assert isinstance(gsm8k[0], PromptRecord)
    assert gsm8k[0].completion.endswith("#### 72")
    assert len(list(iter_records(asset("data/alpaca_en_demo/alpaca_en_demo.json")))) == 999
    identity = list(iter_records(asset("data/alpaca_en_demo/identity.json")))
    assert len(identity) == 91
    assert identity[1].where.endswith("identity.json, record 2")


def test_lines_are_read_as_they_come(tmp_path: Path) -> None:
    """The first record is there before the broken end of the file has been looked at."""
    path = jsonl(tmp_path, {"text": "a"}, {"text": "b"}, [])
    records = iter_records(path)
    assert next(records) == TextRecord(f"{path}, line 1", "a")
    next(records)
    with pytest.raises(DataError, match="line 3: found a list"):
        next(records)


def test_byte_order_mark_blank_lines_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "\xc3\xa9"}')
    assert [(r.where[-6:], r.text) for r in iter_records(path)] == [
        ("line 1", "a"),
        ("line 4", "é"),
    ]
    path = tmp_path / "train.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\n")
    assert "".join(iter_plain(path)) == "a\r\nb\n"
    path = tmp_path / "train.json"
    path.write_bytes(b'\xef\xbb\xbf[{"text": "a"}]')
    assert len(list(iter_records(path))) == 1


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', "line 2: not valid JSON: .*column 13"),
        (b'{"text": "a"} {"text": "b"}\n', "line 1: not valid JSON: Extra data"),
        (b'{"text": "a"}\n"text"\n', "line 2: found a string; expected an object"),
        (b'{"text": "a"}\n{}\n', "line 2: the record is empty"),
        (b'{"text": "a"}\n{"text": ""}\n', "line 2: 'text' is empty"),
        (b'{"text": " \\n"}\n', "line 1: 'text' is empty"),
        (b'{"text": 3}\n', "line 1: 'text' is a number; expected a string"),
        (b'{"text": null}\n', "line 1: 'text' is null; expected a string"),
        (b'{"text": "\\ud83d"}\n', r"line 1: 'text': character 1 is \\ud83d, half of a surrogate"),
        (b'{"text": "\xff"}\n', "line 1: byte 0xff at 11 is not UTF-8"),
        (b"[" * 100_000, "line 1: not valid JSON: nested too deeply"),
        (b'{"text": "a"}\n{"prompt": "a"}\n', "line 2: found the keys 'prompt'; the first record"),
        (b'{"prompt": "a", "completion": ""}\n', "line 1: 'completion' is empty"),
        (b'{"prompt": "", "completion": "b"}\n', "line 1: 'prompt' is empty"),
        (b'{"instruction": "a", "output": ""}\n', "line 1: 'output' is empty"),
        (b'{"instruction": "a", "input": 1, "output": "b"}\n', "'input' is a number"),
        (b'{"conversations": []}\n', "line 1: no known format has the keys 'conversations'"),
        (b"", "holds no records"),
        (b"\n \n", "holds no records"),
        (b"\xff\xfe{\x00", "is UTF-16. Save it as UTF-8"),
    ],
)
def test_bad_lines(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        list(iter_records(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "'messages' is empty"),
        ("Hi", "'messages' is a string; expected a list of messages"),
        (["Hi"], "message 1 is a string; expected an object"),
        ([{"from": "human", "value": "Hi"}], "message 1 has the keys 'from', 'value'; expected"),
        ([{"role": "user"}, BOT], "message 1 has the keys 'role'; expected"),
        ([{}, BOT], r"message 1 has the keys \(none\)"),
        ([{"role": "human", "content": "Hi"}, BOT], "message 1 has the role 'human'; expected sys"),
        ([{"role": ["user"], "content": "Hi"}, BOT], "message 1 has the role a list"),
        ([{"role": "user", "content": [{"type": "text"}]}, BOT], "'content' is a list; expected a"),
        ([{"role": "user", "content": ""}, BOT], r"message 1 \(user\): 'content' is empty"),
        ([USER, {"role": "assistant", "content": " "}], r"message 2 \(assistant\): .* is empty"),
        ([USER, {"role": "assistant", "content": None}], "'content' is null; expected a string"),
        ([USER, {**BOT, "tool_calls": "x"}], "'tool_calls' must be a list in an assistant"),
        ([BOT], "message 1 is from assistant; expected user to speak first"),
        ([SYSTEM, BOT], "message 2 is from assistant; expected user to speak first"),
        ([TOOL, BOT], "message 1 is from tool; expected user to speak first"),
        ([USER, SYSTEM, BOT], "message 2 is from system, which may only come first"),
        ([SYSTEM, SYSTEM, USER, BOT], "message 2 is from system, which may only come first"),
        ([USER, USER, BOT], "message 2 is a second user message in a row"),
        ([USER, BOT, BOT], "message 3 is a second assistant message in a row"),
        ([USER, TOOL, BOT], "message 2 is from tool after user"),
        ([SYSTEM, USER], "no message is from assistant"),
        ([SYSTEM], "no message is from assistant"),
    ],
)
def test_bad_chats(messages: Any, message: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"messages": [USER, BOT]}, {"messages": messages})
    with pytest.raises(DataError, match=f"line 2: .*{message}"):
        list(iter_records(path))


def test_good_chats(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    bare = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    chats = [
        [USER, BOT, USER],
        [{"role": "system", "content": ""}, USER, BOT, USER, BOT],
        [USER, call, TOOL, TOOL, BOT],
        [USER, bare, {"role": "tool", "content": ""}, BOT, USER, BOT],
    ]
    path = jsonl(tmp_path, *({"messages": chat} for chat in chats))
    assert [record.messages for record in iter_records(path)] == chats


def test_problems_are_reported_together(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": ""}, {"prompt": "a"}, {"text": 1}]
    path = jsonl(tmp_path, *rows)
    assert problems(path) == (
        f"{path} cannot be used:\n"
        "  - line 2: 'text' is empty\n"
        "  - line 3: found the keys 'prompt'; the first record is text, so expected 'text'\n"
        "  - line 4: 'text' is a number; expected a string\n"
        "Mend or remove these records."
    )
    records = iter_records(jsonl(tmp_path, rows[0], rows[1], rows[0]))
    assert next(records)
    with pytest.raises(DataError):  # the good third record is checked, but not given out
        next(records)
    many = problems(jsonl(tmp_path, *([{"text": ""}] * 500)))
    assert "line 10: 'text' is empty\n  - and perhaps more: reading stopped here" in many
    assert "line 11" not in many


def test_unknown_keys_name_every_format(tmp_path: Path) -> None:
    text = problems(jsonl(tmp_path, {"a": 1, "b": 2}), FeatureNames(prompt="q", chat="turns"))
    assert "no known format has the keys 'a', 'b'" in text
    for expected in ("chat: 'turns'", "'q', 'completion'", "'instruction', 'output'", "'text'"):
        assert expected in text
    assert "--prompt-feature" in text


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    for raw, message in (
        ('[{"text": "a"}, {"text": 1}]', r"record 2: 'text' is a number"),
        ('{"text": "a"}', "holds an object; expected a JSON list of records"),
        ('{"text": "a"}\n{"text": "b"}', r"Rename it to train\.jsonl"),
        ('[\n{"text": "a"},\n]', r"train\.json is not valid JSON: .* \(line \d, column"),
        ("[]", "holds no records"),
        (" ", "is empty"),
    ):
        path.write_text(raw)
        with pytest.raises(DataError, match=message):
            list(iter_records(path))
    path.write_bytes(b'[\n"\xe9"]')
    with pytest.raises(DataError, match="is not UTF-8: byte 0xe9 on line 2"):
        list(iter_records(path))


def test_text_files(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(b" \n")
    with pytest.raises(DataError, match=r"train\.txt is empty"):
        "".join(iter_plain(path))
    path.write_bytes(b"a\n\xe9")
    with pytest.raises(DataError, match="is not UTF-8: byte 0xe9 on line 2"):
        "".join(iter_plain(path))


def test_which_file_holds_a_split(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"no data at .*: No such file .*\. Expected a \.jsonl,",
    ):
        resolve_split(tmp_path / "nothing", "train")
    with pytest.raises(DataError, match=r"no data at .*: File name too long"):
        resolve_split(tmp_path / ("x" * 300), "train")
    with pytest.raises(DataError, match=r"holds no train\.jsonl .* it holds nothing"):
        require_split(tmp_path, ("train",))
    (tmp_path / "data.csv").touch()
    with pytest.raises(DataError, match=r"unknown suffix '.csv'"):
        resolve_split(tmp_path / "data.csv", "train")
    with pytest.raises(DataError, match=r"holds no test\.jsonl or valid\.jsonl .*data\.csv"):
        require_split(tmp_path, ("test", "valid"))
    (tmp_path / "valid.txt").touch()
    assert resolve_split(tmp_path, "train") is None
    assert require_split(tmp_path, ("test", "valid")) == tmp_path / "valid.txt"
    assert resolve_split(tmp_path / "valid.txt", "train") == tmp_path / "valid.txt"
    (tmp_path / "valid.json").touch()
    with pytest.raises(DataError, match=r"holds both valid\.json and valid\.txt"):
        resolve_split(tmp_path, "valid")
