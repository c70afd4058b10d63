"""A cache gives back what was written, reads no more than it is asked for, and is never half."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from caches import write_cache
from safetensors.numpy import load_file

from lowtide.data import cache
from lowtide.data.cache import CacheWriter, TokenDataset
from lowtide.errors import DataError, OutputError

SEQUENCES = [([5, 6, 7], [0, 1, 1]), ([], []), ([2**31 - 1, 0], [1, 0]), ([0] * 9, [1, 0, 1] * 3)]


def all_lengths(dataset: TokenDataset) -> list[int]:
    return dataset.lengths_of(np.arange(len(dataset))).tolist()


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "train.safetensors"
    write_cache(path, SEQUENCES)
    dataset = TokenDataset.open(path)
    assert (len(dataset), dataset.n_tokens, dataset.longest) == (4, 14, 9)
    assert all_lengths(dataset) == [3, 0, 2, 9]
    assert dataset.lengths_of(np.array([3, 0, 3])).tolist() == [9, 3, 9]
    for i, (ids, trained) in enumerate(SEQUENCES):
        labels = [token if flag else -100 for token, flag in zip(ids, trained, strict=True)]
        assert dataset.sequence(i) == (ids, labels)
    assert dataset.sequence(-1) == dataset.sequence(3)
    assert all(type(i) is int for i in dataset.sequence(0)[0])
    for outside in (4, -5):
        with pytest.raises(IndexError):
            dataset.sequence(outside)


@pytest.mark.parametrize("extra", [0, 1])
def test_it_is_an_ordinary_safetensors_file(tmp_path: Path, extra: int) -> None:
    """Also with an odd number of tokens, after which the offsets would not be aligned."""
    path = write_cache(tmp_path / "c.safetensors", [*SEQUENCES, ([1] * extra, [1] * extra)])
    tensors = load_file(path)
    assert {name: str(t.dtype) for name, t in tensors.items()} == {
        "ids": "int32",
        "offsets": "int64",
        "digests": "uint64",
    }
    header = json.loads(path.read_bytes()[8:512])
    assert header["offsets"]["data_offsets"][0] % 8 == 0
    assert tensors["offsets"].tolist() == [0, 3, 3, 5, 14, 14 + extra]
    assert tensors["digests"].tolist() == [0, 1, 2, 3, 4]
    assert len(tensors["ids"]) == 14 + 2 * extra
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_no_sequence_at_all(tmp_path: Path) -> None:
    dataset = TokenDataset.open(write_cache(tmp_path / "c.safetensors", []))
    assert (len(dataset), dataset.n_tokens, dataset.longest) == (0, 0, 0)


def test_many_flushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_FLUSH_TOKENS", 7)
    sequences = [([i, i + 1, i + 2][: i % 4], [1, 0, 1][: i % 4]) for i in range(100)]
    dataset = TokenDataset.open(write_cache(tmp_path / "c.safetensors", sequences))
    assert [dataset.sequence(i)[0] for i in range(100)] == [ids for ids, _ in sequences]
    assert all_lengths(dataset) == [len(ids) for ids, _ in sequences]


def test_reading_does_not_load_the_tokens(tmp_path: Path) -> None:
    """32 MB of tokens, and reading some must not make the process grow by a tenth of that."""
    path = tmp_path / "c.safetensors"
    block = ([1] * 4096, [1] * 4096)
    write_cache(path, (block for _ in range(2000)))
    assert path.stat().st_size > 32_000_000
    before = _anonymous_bytes()
    dataset = TokenDataset.open(path)
    for i in range(0, 2000, 7):
        dataset.sequence(i)
    assert sum(all_lengths(dataset)) == dataset.n_tokens
    assert _anonymous_bytes() - before < 3_000_000


def test_writing_holds_little(tmp_path: Path) -> None:
    before = _anonymous_bytes()
    peak = 0

    def sequences() -> Iterator[tuple[list[int], list[int]]]:
        nonlocal peak
        block = ([1] * 4096, [1] * 4096)
        for _ in range(2000):
            yield block
            peak = max(peak, _anonymous_bytes())

    write_cache(tmp_path / "c.safetensors", sequences())
    assert peak - before < 4_000_000


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    pytest.skip("needs /proc/self/status with RssAnon")


def test_without_a_commit_nothing_is_left(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[list[int], list[int]]]:
        yield [1], [1]
        raise DataError("line 2")

    with pytest.raises(DataError, match="line 2"):
        write_cache(tmp_path / "c.safetensors", failing())
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        OutputError, match=r"cannot write the token cache .*: (Not a d|File exists).*--cache-dir"
    ):
        CacheWriter(tmp_path / "file" / "c.safetensors")


FULL = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from caches import write_cache
from lowtide.errors import OutputError
try:
    write_cache(Path(sys.argv[1]), (([1] * 999, [1] * 999) for _ in range(int(sys.argv[3]))))
except OutputError as error:
    print(error)
"""


@pytest.mark.parametrize("records", [10, 30, 3000])
def test_a_full_disk_is_told_and_leaves_nothing(
    bare_room: str, tmp_path: Path, records: int
) -> None:
    """The limit is met in the first write, at the end, and in the midst."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    path = tmp_path / "out" / "c.safetensors"
    path.parent.mkdir()
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", bare_room + FULL, str(path), here, str(records)],
        capture_output=True, text=True, preexec_fn=limit,
    )  # fmt: skip
    assert done.stdout.startswith(f"cannot write the token cache {path}: File too large. Free")
    assert done.stderr == ""
    assert list(path.parent.iterdir()) == []


def test_broken_caches(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(DataError, match="no token cache at"):
        TokenDataset.open(path)
    whole = write_cache(path, SEQUENCES).read_bytes()
    broken = (
        b"",
        whole[:40],
        whole[:-1],
        b"\xff" * 1000,
        whole.replace(b'"digests"', b'"gidests"'),
        whole.replace(b"lowtide tokens", b"lowtide_tokens"),
        whole.replace(b'"U64"', b'"U32"'),
        whole[:8] + b"[" + whole[9:511] + b"]" + whole[512:],
        whole[:8] + b"[]".ljust(504) + whole[512:],
        whole.replace((14).to_bytes(8, "little"), (99).to_bytes(8, "little")),
    )
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"is not a whole token cache: .*Delete it"):
            TokenDataset.open(path)
