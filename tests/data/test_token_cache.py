"""A cache gives back what was written, reads no more than it is asked for, and is never half."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from lowtide.data import cache
from lowtide.data.cache import TokenDataset, temporary_path, write_cache
from lowtide.errors import DataError, OutputError

SEQUENCES = [([5, 6, 7], [0, 1, 1]), ([], []), ([2**31 - 1], [1]), ([0] * 9, [1, 0, 1] * 3)]


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "train.safetensors"
    write_cache(path, SEQUENCES)
    dataset = TokenDataset.open(path)
    assert len(dataset) == 4
    assert dataset.n_tokens == 13
    assert list(dataset.lengths) == [3, 0, 1, 9]
    for i, (ids, trained) in enumerate(SEQUENCES):
        labels = [token if flag else -100 for token, flag in zip(ids, trained, strict=True)]
        assert dataset.sequence(i) == (ids, labels)
    assert dataset.sequence(-1) == dataset.sequence(3)
    assert all(type(i) is int for i in dataset.sequence(0)[0])
    with pytest.raises(IndexError):
        dataset.sequence(4)
    with pytest.raises(IndexError):
        dataset.sequence(-5)


def test_it_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    write_cache(tmp_path / "c.safetensors", SEQUENCES)
    tensors = load_file(tmp_path / "c.safetensors")
    assert {name: str(t.dtype) for name, t in tensors.items()} == {
        "offsets": "int64",
        "ids": "int32",
        "trained": "uint8",
    }
    header = int.from_bytes((tmp_path / "c.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0, "the tensors must be aligned for mapping"
    assert tensors["offsets"].tolist() == [0, 3, 3, 4, 13]
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_many_flushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_FLUSH_TOKENS", 7)
    sequences = [([i, i + 1, i + 2][: i % 4], [1, 0, 1][: i % 4]) for i in range(100)]
    write_cache(tmp_path / "c.safetensors", sequences)
    dataset = TokenDataset.open(tmp_path / "c.safetensors")
    assert [dataset.sequence(i)[0] for i in range(100)] == [ids for ids, _ in sequences]
    assert list(dataset.lengths) == [len(ids) for ids, _ in sequences]


def test_reading_does_not_load_the_tokens(tmp_path: Path) -> None:
    """40 MB of tokens, and reading some must not make the process grow by a tenth of that."""
    path = tmp_path / "c.safetensors"
    block = ([1] * 4096, [1] * 4096)
    write_cache(path, (block for _ in range(2000)))
    assert path.stat().st_size > 40_000_000
    before = _anonymous_bytes()
    dataset = TokenDataset.open(path)
    for i in range(0, 2000, 7):
        dataset.sequence(i)
    assert sum(dataset.lengths) == dataset.n_tokens
    assert _anonymous_bytes() - before < 4_000_000


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


def test_a_failed_write_leaves_the_old_cache(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    write_cache(path, SEQUENCES)

    def failing() -> Iterator[tuple[list[int], list[int]]]:
        yield [1], [1]
        raise DataError("line 2")

    with pytest.raises(DataError, match="line 2"):
        write_cache(path, failing())
    assert len(TokenDataset.open(path)) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_an_unwritable_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        OutputError, match=r"cannot write the token cache .*: (Not a d|File exists)"
    ):
        write_cache(tmp_path / "file" / "c.safetensors", SEQUENCES)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.raises(OutputError, match=r"No space left on device. Free some space"):
        write_cache(tmp_path / "c.safetensors", SEQUENCES)
    assert not temporary_path(tmp_path / "c.safetensors").exists()


def test_broken_caches(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(DataError, match="no token cache at"):
        TokenDataset.open(path)
    write_cache(path, SEQUENCES)
    whole = path.read_bytes()
    for broken in (b"", whole[:40], whole[:-1], b"\xff" * 64):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"is not a whole token cache: .*Delete it"):
            TokenDataset.open(path)
    path.write_bytes(whole.replace(b'"trained"', b'"untrain"'))
    with pytest.raises(DataError, match="is not a whole token cache"):
        TokenDataset.open(path)
    start = 8 + int.from_bytes(whole[:8], "little")
    last = start + 8 * 4  # the fifth offset
    path.write_bytes(whole[:last] + (99).to_bytes(8, "little") + whole[last + 8 :])
    with pytest.raises(DataError, match="offsets do not end where its tokens end"):
        TokenDataset.open(path)
