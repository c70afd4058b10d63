"""A token cache is found by what is in it, and never used unless it is what was written."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from lowtide.data import keys, worker
from lowtide.data import prepare as prepare_module
from lowtide.data.cache import TokenDataset
from lowtide.data.formats import FeatureNames
from lowtide.data.prepare import PrepareReport, PrepareRequest, prepare
from lowtide.data.store import TokenStore
from lowtide.errors import DataError, LowtideWarning, OutputError

Request = Callable[..., PrepareRequest]
Write = Callable[..., Path]


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if not path.name.startswith("."))


def ids(report: PrepareReport, split: str = "train") -> list[list[int]]:
    dataset = TokenDataset.open(report.splits[split].path)
    return [dataset.sequence(i)[0] for i in range(len(dataset))]


def test_the_second_time_nothing_is_tokenised(
    request_for: Request, tmp_path: Path, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "d.jsonl", {"text": "a"}, {"text": "bc"})
    first = worker.run(request_for(path, valid_records=1))
    assert not any(split.from_store for split in first.splits.values())
    monkeypatch.setattr(worker.Tokenizer, "load", None)
    moved = tmp_path / "elsewhere.jsonl"
    shutil.move(path, moved)
    os.utime(moved, (0, 0))
    again = worker.run(request_for(moved, valid_records=1))
    assert all(split.from_store for split in again.splits.values())
    assert "; tokenised before" in again.splits["train"].summary()
    assert again.splits["train"].source == moved
    for name in ("train", "valid"):
        assert again.splits[name].path == first.splits[name].path
        same = replace(again.splits[name], from_store=False, source=path)
        assert same == first.splits[name]
    assert entries(tmp_path / "cache") == [first.splits["train"].path.parent]


def test_whatever_decides_the_tokens_decides_the_key(
    request_for: Request, tmp_path: Path, write_rows: Write, tiny_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    row = {"prompt": "ab", "completion": "c", "p": "x"}
    path = write_rows(tmp_path / "d.jsonl", row, row)
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")

    def found(**given: Any) -> bool:
        return worker.run(request_for(path, **given)).splits["train"].from_store

    others: list[dict[str, Any]] = [
        {},
        {"max_seq_length": 63},
        {"vocab_size": 260},
        {"mask_prompt": True},
        {"chat_template": "none"},
        {"chat_template": str(template)},
        {"features": FeatureNames(prompt="p")},
        {"valid_records": 1},
    ]
    for given in others:
        assert not found(**given), given
        assert found(**given), given
    template.write_text("{% for m in messages %}{{ m.content }};{% endfor %}")
    assert not found(chat_template=str(template))
    config = tiny_directory / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"<eos>"', '"<|im_end|>"'))
    assert not found()
    write_rows(path, row, row, row)
    assert not found()
    (tmp_path / "d.json").write_text(json.dumps([row] * 3))
    path = tmp_path / "d.json"
    assert not found()
    monkeypatch.setattr(keys, "version", lambda name: "0.0")
    assert not found()
    monkeypatch.setattr(keys, "_code", lambda: "of another release")
    assert not found()


def test_a_template_that_tells_the_date_is_rendered_anew_each_day(
    request_for: Request, tmp_path: Path, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "t.jinja"
    turns = "{% for m in messages %}{{ m.content }}{% endfor %}"
    template.write_text("{{ strftime_now('%d') }}" + turns)
    path = write_rows(tmp_path / "d.jsonl", {"prompt": "ab", "completion": "c"})

    class Tomorrow:
        @staticmethod
        def today() -> Any:
            return date.today() + timedelta(days=1)

    def found(**given: Any) -> bool:
        return worker.run(request_for(path, **given)).splits["train"].from_store

    assert not found(chat_template=str(template))
    assert not found()
    assert found(chat_template=str(template))
    monkeypatch.setattr(keys, "date", Tomorrow)
    assert not found(chat_template=str(template))
    assert found(), "the tokenizer's own template tells no date"


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


SPOILT: dict[str, Callable[[Path], object]] = {
    "one bit": lambda entry: _flip(entry / "tokens.safetensors"),
    "cut off": lambda entry: os.truncate(entry / "tokens.safetensors", 600),
    "missing": lambda entry: (entry / "tokens.safetensors").unlink(),
    "empty": lambda entry: (entry / "tokens.safetensors").write_bytes(b""),
    "no description": lambda entry: (entry / "entry.json").unlink(),
    "broken description": lambda entry: (entry / "entry.json").write_text('{"key": '),
    "foreign description": lambda entry: (entry / "entry.json").write_text("[]"),
    "of another key": lambda entry: (entry / "entry.json").write_text(
        (entry / "entry.json").read_text().replace(entry.name, "0" * 32)
    ),
    "a file": lambda entry: (shutil.rmtree(entry), entry.write_text("x")),
}


@pytest.mark.parametrize("how", list(SPOILT))
def test_a_cache_that_is_not_what_was_written_is_made_again(
    how: str, request_for: Request, tmp_path: Path, write_rows: Write
) -> None:
    path = write_rows(tmp_path / "d.jsonl", *({"text": f"text {i}"} for i in range(50)))
    truth = ids(worker.run(request_for(path)))
    (entry,) = entries(tmp_path / "cache")
    SPOILT[how](entry)
    report = worker.run(request_for(path))
    assert not report.splits["train"].from_store
    assert ids(report) == truth
    assert worker.run(request_for(path)).splits["train"].from_store
    assert list((tmp_path / "cache").iterdir()) == [entry]
    assert sorted(p.name for p in entry.iterdir()) == ["entry.json", "tokens.safetensors"]


def _prepare(request: PrepareRequest, answers: Any) -> None:
    report = worker.run(request)
    answers.put((report.splits["train"].from_store, ids(report)))


def test_runs_at_once_make_one_cache(
    request_for: Request, tmp_path: Path, write_rows: Write
) -> None:
    path = write_rows(tmp_path / "d.jsonl", *({"text": f"text {i}"} for i in range(500)))
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()
    requests = [request_for(path) for _ in range(4)]
    children = [context.Process(target=_prepare, args=(one, answers)) for one in requests]
    for child in children:
        child.start()
    seen = [answers.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert sorted(found for found, _ in seen) == [False, True, True, True]
    assert all(one == seen[0][1] for _, one in seen)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_makes_is_not(
    request_for: Request, tmp_path: Path, write_rows: Write
) -> None:
    path = write_rows(tmp_path / "d.jsonl", {"text": "a"})
    cache = tmp_path / "cache"
    for name in (".building-0123-dead", ".building-4567-alive"):
        (cache / name).mkdir(parents=True)
        (cache / name / "tokens.safetensors").write_bytes(b"x")
    with TokenStore(cache, "other").locked("4567"):
        # what it made is swept for its own key only, so make it again
        (cache / ".building-4567-alive").mkdir(exist_ok=True)
        worker.run(request_for(path))
        left = {p.name for p in cache.iterdir()}
    assert ".building-0123-dead" not in left
    assert {".building-4567-alive", ".4567.lock"} < left
    assert not (cache / ".4567.lock").exists()


def test_a_full_disk_is_told_and_leaves_nothing(
    request_for: Request, tmp_path: Path, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "d.jsonl", *({"text": "ab" * 20} for _ in range(2000)))
    real = subprocess.Popen

    def start(command: list[str], **settings: Any) -> Any:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

        return real(command, preexec_fn=limit, **settings)

    monkeypatch.setattr(prepare_module.subprocess, "Popen", start)
    with pytest.raises(OutputError, match=r"cannot write the token cache .*Free some space"):
        prepare(request_for(path))
    assert list((tmp_path / "cache").iterdir()) == []


def test_data_that_changes_while_it_is_read(
    request_for: Request, tmp_path: Path, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "d.jsonl", {"text": "a"})
    real = worker.iter_records

    def reading(source: Path, names: FeatureNames) -> Any:
        yield from real(source, names)
        write_rows(path, {"text": "another"})

    monkeypatch.setattr(worker, "iter_records", reading)
    with pytest.raises(DataError, match=r"d\.jsonl was changed while it was read. Try again"):
        worker.run(request_for(path))
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_no_file(request_for: Request, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "d.jsonl")
    with pytest.raises(DataError, match=r"is not a regular file .*Save it to a file first"):
        worker.run(request_for(tmp_path / "d.jsonl"))


@pytest.mark.parametrize(
    ("valid", "message"),
    [
        (["t0", "t1", "t2", "t3"], "all 4 validation records are in the training data too"),
        (["t3", "t3"], "all 2 validation records are in the training data too"),
        (["x", "t2", "y"], "1 of 3 validation records are in the training data too, so that"),
        ([], r"goes on without validation: .*valid\.jsonl holds no records"),
    ],
)
def test_validation_data_that_says_little_is_warned_of(
    valid: list[str], message: str, request_for: Request, tmp_path: Path, write_rows: Write
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", *({"text": f"t{i}"} for i in range(4)))
    write_rows(tmp_path / "data" / "valid.jsonl", *({"text": text} for text in valid))
    for _ in range(2):  # also where both were tokenised before
        with pytest.warns(LowtideWarning, match=message):
            report = prepare(request_for(tmp_path / "data"))
        assert ("valid" in report.splits) == bool(valid)


def test_validation_data_of_its_own_is_not_warned_of(
    request_for: Request, tmp_path: Path, write_rows: Write
) -> None:
    """Nor are records that only begin alike, where they are cut to the same tokens."""
    write_rows(tmp_path / "data" / "train.jsonl", {"text": "a" * 90 + "b"})
    write_rows(tmp_path / "data" / "valid.jsonl", {"text": "a" * 90 + "c"})
    report = worker.run(request_for(tmp_path / "data"))
    assert ids(report, "train") == ids(report, "valid")
    assert report.warnings == ()


def test_the_child_holds_no_more_for_more_data(
    request_for: Request, tmp_path: Path, write_rows: Write
) -> None:
    """Sixteen times the records; equal texts, so that the tokenizer's word cache is the same."""
    row = {"text": "It was a dark and stormy night. " * 8, "more": "x" * 500}
    peaks = []
    for count in (2_500, 40_000):
        path = write_rows(tmp_path / f"{count}.jsonl", *[row] * count)
        report = prepare(request_for(path))
        assert report.splits["train"].records == count
        peaks.append(report.child_peak_rss_bytes)
    assert path.stat().st_size > 30_000_000
    assert peaks[1] - peaks[0] < 6_000_000, peaks


def test_the_child_tells_its_own_memory(
    request_for: Request, tmp_path: Path, write_rows: Write
) -> None:
    """Not that of this process, in which torch is loaded."""
    path = write_rows(tmp_path / "d.jsonl", {"text": "a"})
    held = bytearray(150_000_000)
    peak = prepare(request_for(path)).child_peak_rss_bytes
    assert len(held) > peak > 10_000_000


def made(
    cache: Path, request_for: Request, write_rows: Write, count: int, **given: Any
) -> list[Path]:
    """Entries of equal size, each of which was used a day before the next."""
    found = []
    for number in range(count):
        data = write_rows(cache.parent / f"{number}.jsonl", {"text": f"{number} {'x' * 50}"})
        report = worker.run(request_for(data, **given))
        found.append(report.splits["train"].path.parent)
    for number, path in enumerate(found):
        used = time.time() - 86_400 * (count - number)
        os.utime(path, (used, used))
    return found


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def test_what_was_not_used_for_longest_is_removed(
    request_for: Request, tmp_path: Path, write_rows: Write
) -> None:
    cache = tmp_path / "cache"
    old = made(cache, request_for, write_rows, 5)
    limit = 4 * size(old[0]) + 20
    worker.run(request_for(tmp_path / "0.jsonl"))  # used again, which counts
    new = write_rows(tmp_path / "new.jsonl", {"text": f"n {'x' * 50}"})
    added = worker.run(request_for(new, cache_bytes=limit)).splits["train"].path.parent
    assert entries(cache) == sorted([old[0], old[3], old[4], added])
    assert [path for path in cache.iterdir() if path.name.startswith(".")] == []
    assert not worker.run(request_for(tmp_path / "1.jsonl")).splits["train"].from_store


def test_a_run_keeps_what_it_has_open(
    request_for: Request, tmp_path: Path, write_rows: Write
) -> None:
    cache = tmp_path / "cache"
    (old,) = made(cache, request_for, write_rows, 1)
    (file,) = [path for path in old.iterdir() if path.suffix != ".json"]
    dataset = TokenDataset.open(file)
    before = dataset.sequence(0)
    new = write_rows(tmp_path / "new.jsonl", {"text": "n"})
    worker.run(request_for(new, cache_bytes=1))
    assert not old.exists()
    assert dataset.sequence(0) == before


def test_what_somebody_may_be_about_to_open_stays(
    request_for: Request, tmp_path: Path, write_rows: Write
) -> None:
    """What was used a moment ago, what another process holds the lock of, and what is not ours."""
    cache = tmp_path / "cache"
    old = made(cache, request_for, write_rows, 3)
    os.utime(old[0])
    (cache / "mine").mkdir()
    (cache / "mine" / "file").write_text("x" * 1000)
    with TokenStore(cache, "another").locked(old[1].name):
        new = write_rows(tmp_path / "new.jsonl", {"text": "n"})
        added = worker.run(request_for(new, cache_bytes=1)).splits["train"].path.parent
        assert entries(cache) == sorted([old[0], old[1], added, cache / "mine"])


def test_runs_at_once_may_all_prune(
    request_for: Request, tmp_path: Path, write_rows: Write
) -> None:
    cache = tmp_path / "cache"
    made(cache, request_for, write_rows, 12)
    new = [write_rows(tmp_path / f"n{i}.jsonl", {"text": f"n{i}"}) for i in range(3)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        reports = pool.map(worker.run, [request_for(path, cache_bytes=1) for path in new])
    assert entries(cache) == sorted(report.splits["train"].path.parent for report in reports)
    assert all(ids(report) for report in reports)
