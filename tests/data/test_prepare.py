"""What is written and reported, and how errors arrive."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowtide.data import worker
from lowtide.data.cache import TokenDataset
from lowtide.data.formats import FeatureNames
from lowtide.data.prepare import PrepareReport, PrepareRequest, SplitReport, prepare
from lowtide.data.tokenizer import Tokenizer
from lowtide.errors import ConfigError, DataError, LowtideError, ModelError, OutputError


def texts(tokenizer: Path, split: SplitReport) -> list[str]:
    loaded = Tokenizer.load(tokenizer)
    dataset = TokenDataset.open(split.path)
    return [loaded.decode(dataset.sequence(i)[0]) for i in range(len(dataset))]


def test_gsm8k_in_a_child(asset: Callable[[str], Path], qwen: Tokenizer, tmp_path: Path) -> None:
    rows = asset("data/gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    data = tmp_path / "test.jsonl"
    data.write_text("\n".join(rows), encoding="utf-8")
    request = PrepareRequest(
        data=data,
        tokenizer=asset("tokenizers/Qwen2.5-Instruct"),
        cache=tmp_path / "cache",
        max_seq_length=200,
        vocab_size=151_936,
        split="eval",
        mask_prompt=True,
    )
    (split,) = prepare(request).splits.values()
    dataset = TokenDataset.open(split.path)
    assert split.path.parent.parent == tmp_path / "cache"
    assert split.source == data
    assert len(dataset) == split.records == 200 - split.dropped_records
    lengths = dataset.lengths_of(np.arange(len(dataset)))
    assert dataset.n_tokens == split.tokens == sum(lengths)
    assert dataset.longest == max(lengths) == split.longest == 200
    labels = [dataset.sequence(i)[1] for i in range(len(dataset))]
    assert split.trained_tokens == sum(x != -100 for each in labels for x in each[1:])
    uncut = sum(
        len(qwen.encode(qwen.render_chat(chat), False)) for chat in (_chat(row) for row in rows)
    )
    assert split.tokens + split.dropped_tokens == uncut
    assert 0 < split.truncated_records < 200
    answer = json.loads(rows[0])["answer"]
    kept = [token for token in labels[0] if token != -100]
    assert qwen.decode(kept, skip_special_tokens=False) == answer + "<|im_end|>"


def _chat(row: str) -> list[dict[str, str]]:
    values = json.loads(row)
    return [
        {"role": "user", "content": values["question"]},
        {"role": "assistant", "content": values["answer"]},
    ]


def test_text_with_the_last_windows_held_out(
    asset: Callable[[str], Path], stories: Tokenizer, tmp_path: Path
) -> None:
    data = asset("data/wizard_of_oz/wizard_of_oz.txt")
    request = PrepareRequest(
        data=data,
        tokenizer=asset("models/stories260K/hf-llama"),
        cache=tmp_path,
        max_seq_length=128,
        vocab_size=512,
        valid_records=64,
    )
    splits = prepare(request).splits
    train, valid = (TokenDataset.open(splits[name].path) for name in ("train", "valid"))
    assert (len(train), len(valid)) == (1025, 64)
    stream = [i for part in (train, valid) for k in range(len(part)) for i in part.sequence(k)[0]]
    assert stream == stories.encode(data.read_text(encoding="utf-8"))
    assert splits["valid"].trained_tokens == 64 * 127


def test_where_validation_comes_from(
    request_for: Callable[..., PrepareRequest],
    tmp_path: Path,
    tiny_directory: Path,
    write_rows: Callable[..., Path],
) -> None:
    data = tmp_path / "data"
    write_rows(data / "train.jsonl", *({"text": f"t{i}"} for i in range(5)))
    other = write_rows(tmp_path / "other.jsonl", {"text": "o"})

    def valid(**settings: Any) -> list[str] | None:
        splits = worker.run(request_for(data, **settings)).splits
        assert texts(tiny_directory, splits["train"])[0] == "t0"
        return texts(tiny_directory, splits["valid"]) if "valid" in splits else None

    assert valid() is None
    assert valid(valid_records=2) == ["t3", "t4"]
    assert valid(valid_data=other, valid_records=2) == ["o"]
    write_rows(data / "valid.jsonl", {"text": "v"})
    assert valid(valid_records=2) == ["v"]
    assert valid(valid_data=other) == ["o"]
    with pytest.raises(DataError, match=r"holds no valid\.jsonl .*it holds"):
        valid(valid_data=tiny_directory)


def test_which_split_is_evaluated(
    request_for: Callable[..., PrepareRequest],
    tmp_path: Path,
    tiny_directory: Path,
    write_rows: Callable[..., Path],
) -> None:
    data = tmp_path / "data"
    train = write_rows(data / "train.jsonl", {"text": "t"})

    def evaluated(path: Path) -> list[str]:
        (split,) = worker.run(request_for(path, split="eval")).splits.values()
        return texts(tiny_directory, split)

    with pytest.raises(DataError, match=r"holds no test\.jsonl or valid\.jsonl"):
        evaluated(data)
    write_rows(data / "valid.jsonl", {"text": "v"})
    assert evaluated(data) == ["v"]
    write_rows(data / "test.jsonl", {"text": "x"})
    assert evaluated(data) == ["x"]
    assert evaluated(train) == ["t"]


def test_counts_of_what_was_cut(
    request_for: Callable[..., PrepareRequest], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    rows = [("ab", "cd"), ("abcd", "efgh"), ("abcdefgh", "i")]  # 5, 9 and 10 tokens with EOS
    path = write_rows(
        tmp_path / "d.jsonl", *({"q": prompt, "a": completion} for prompt, completion in rows)
    )
    request = request_for(
        path,
        max_seq_length=6,
        mask_prompt=True,
        chat_template="none",
        features=FeatureNames(prompt="q", completion="a"),
    )
    split = prepare(request).splits["train"]
    assert (split.records, split.tokens, split.trained_tokens) == (2, 11, 3 + 2)
    assert (split.truncated_records, split.dropped_records, split.longest) == (1, 1, 6)
    assert split.dropped_tokens == 3 + 10
    assert split.summary() == (
        "2 records, 11 tokens (5 trained on), longest 6; 1 truncated; 1 dropped with nothing "
        "left to train on; 13 tokens not used"
    )


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"vocab_size": 50}, DataError, "line 1: tokenizer and model do not match"),
        ({"max_seq_length": 3, "mask_prompt": True}, DataError, "in all 2 records, no token"),
        ({"valid_records": 2}, DataError, "too few records to hold out 2"),
        ({"valid_records": -1}, ConfigError, "valid_records is -1"),
        ({"max_seq_length": 1}, ConfigError, "max_seq_length is 1"),
        ({"tokenizer": Path("/nothing")}, ModelError, "no tokenizer: /nothing is not a directory"),
        ({"data": Path("/nothing")}, DataError, "no data at /nothing"),
        ({"cache": Path("/dev/null/x")}, OutputError, "cannot write the token cache"),
    ],
)
def test_errors_of_each_kind(
    settings: dict[str, Any],
    kind: type[LowtideError],
    message: str,
    request_for: Callable[..., PrepareRequest],
    tmp_path: Path,
    write_rows: Callable[..., Path],
) -> None:
    rows = [{"prompt": "abcdef", "completion": "x"}] * 2
    path = write_rows(tmp_path / "d.jsonl", *rows)
    with pytest.raises(kind, match=message) as caught:
        worker.run(request_for(**{"data": path, **settings}))
    assert caught.value.kind == kind.__name__
    cache = tmp_path / "cache"
    assert not cache.exists() or not list(cache.iterdir())


def test_errors_cross_to_the_parent(
    request_for: Callable[..., PrepareRequest], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    path = write_rows(tmp_path / "d.jsonl", {"text": "é"}, {"text": ""})
    with pytest.raises(DataError) as caught:
        prepare(request_for(path))
    assert str(caught.value) == (
        f"{path} cannot be used:\n  - line 2: 'text' is empty\nMend or remove these records."
    )
    with pytest.raises(ConfigError, match="--mask-prompt needs prompts to mask"):
        prepare(request_for(write_rows(path, {"text": "a"}), mask_prompt=True))


def test_a_bad_validation_file_leaves_no_caches(
    request_for: Callable[..., PrepareRequest], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    data = tmp_path / "data"
    write_rows(data / "train.jsonl", {"text": "new"})
    write_rows(data / "valid.jsonl", {"text": 1})
    with pytest.raises(DataError, match=r"valid\.jsonl cannot be used"):
        worker.run(request_for(data))
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_crosses_comes_back_whole(tmp_path: Path) -> None:
    request = PrepareRequest(
        data=Path("d é \udcff"),
        tokenizer=Path("t"),
        cache=Path("o"),
        max_seq_length=3,
        vocab_size=4,
        split="eval",
        mask_prompt=True,
        features=FeatureNames(prompt="p"),
        chat_template="none",
        valid_data=Path("v"),
        valid_records=5,
    )
    assert PrepareRequest.from_json(request.to_json()) == request
    split = SplitReport(Path("p"), Path("s"), 1, 2, 3, 4, 5, 6, 7, "abc", True)
    report = PrepareReport({"train": split}, ("said",), 10)
    assert PrepareReport.from_dict(json.loads(report.to_json())) == report
