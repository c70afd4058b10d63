"""Whatever stops a merge, its directory is as it was, or whole."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import small
from disk import Disk
from merging import write_adapter
from safetensors.torch import load_file, save_file

from lowtide.errors import OutputError
from lowtide.export import merge as module
from lowtide.export.merge import merge
from lowtide.export.merge_record import MergeEntry
from lowtide.weights import whole
from lowtide.weights.whole import whole_directory

Work = Callable[[Path], object]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """A merge of several files, the same to the byte each time."""
    model = small.write_small_model(tmp_path / "model")
    adapter = write_adapter(model, tmp_path / "adapter")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    files = {name: f"part-{number % 3}.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: t for name, t in tensors.items() if files[name] == file}, model / file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    given = {"path": "a", "sha256": "1"}
    entry = MergeEntry("2026-11-24", "0", {"path": "b", "fingerprint": "f"}, given, "float32")
    monkeypatch.setattr(module.MergeEntry, "of", lambda *given: entry)
    return lambda out: merge(model, adapter, out, overwrite=True)


def old(out: Path) -> dict[str, bytes | None]:
    """Make `out` a merged model that is to be replaced; what it holds."""
    out.mkdir()
    names = ["model.safetensors", "notes.json", "lowtide_merge.json"]
    record = json.dumps({"format": 1, "files": names, "merges": []}).encode()
    for name, content in zip(names, (b"old", b"{}", record), strict=True):
        with open(out / name, "wb") as file:
            file.write(content)
    return small.tree(out)


@pytest.fixture
def truth(work: Work, tmp_path: Path) -> dict[str, bytes | None]:
    work(tmp_path / "truth")
    found = small.tree(tmp_path / "truth")
    assert len([name for name in found if name.endswith(".safetensors")]) == 3
    return found


def ended_with(work: Callable[[], object]) -> str | None:
    try:
        work()
    except OutputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("replacing", [False, True])
def test_a_disk_that_is_full_at_any_call_leaves_what_was_there(
    replacing: bool, work: Work, truth: dict[str, bytes | None], tmp_path: Path
) -> None:
    call = 0
    while True:
        call += 1
        root = tmp_path / str(call)
        root.mkdir()
        before = old(root / "out") if replacing else None
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(root, patch, full_at=call)
            told = ended_with(lambda: work(root / "out"))  # noqa: B023  # called at once
        if told is None:
            break
        assert "cannot be written: No space left on device. Free some space" in told
        if os.listdir(root) == ["out"] and small.tree(root / "out") == truth:
            assert call == disk.calls  # only the flush of the name itself failed
            continue
        assert os.listdir(root) == (["out"] if replacing else [])
        assert before is None or small.tree(root / "out") == before
    assert disk.calls == call - 1 > 25
    assert small.tree(root / "out") == truth


@pytest.mark.parametrize("replacing", [False, True])
def test_every_state_that_a_power_cut_may_leave(
    replacing: bool, work: Work, truth: dict[str, bytes | None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The directory is whole or not there; the next merge leaves nothing beside it.

    Replacing is done the way of systems that cannot exchange two names.
    """
    root = tmp_path / "disk"
    root.mkdir()
    monkeypatch.setattr(whole, "_exchange", lambda one, other: False)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(root, patch)
        before = None
        if replacing:
            before = old(root / "out")
            for path in [*(root / "out").iterdir(), root / "out", root]:
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        begun = len(disk.operations)
        work(root / "out")
    states = {}
    for crash in disk.crashes():
        if crash.operations >= begun:
            states.setdefault(tuple(sorted(crash.tree.items())), crash)
    assert len(states) > 20
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # of the many merges that follow
    found = set()
    for number, crash in enumerate(states.values()):
        place = crash.write(tmp_path / f"state-{number}")
        place.mkdir(exist_ok=True)
        held = small.tree(place / "out") if (place / "out").exists() else None
        assert held in (before, truth, None), sorted(held or ())
        found.add("none" if held is None else "new" if held == truth else "old")
        work(place / "out")
        assert os.listdir(place) == ["out"]
        assert small.tree(place / "out") == truth
    assert found == ({"none", "new", "old"} if replacing else {"none", "new"})


def test_what_two_renames_had_set_aside_comes_back(tmp_path: Path) -> None:
    before = old(tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / ".out.lowtide-old")
    with (
        pytest.raises(RuntimeError, match="no more"),
        whole_directory(tmp_path / "out", replaces=True),
    ):
        raise RuntimeError("no more")
    assert os.listdir(tmp_path) == ["out"]
    assert small.tree(tmp_path / "out") == before


def killed(work: Callable[[], object], after_s: float) -> bool:
    """Whether a child that does the work was killed before it was done."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("kills", [40, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_merge_that_is_killed_leaves_nothing_or_all(
    kills: int, replacing: bool, work: Work, truth: dict[str, bytes | None], tmp_path: Path
) -> None:
    """SIGKILL at random moments of as long as a merge takes, each after what the last one left."""
    began = time.monotonic()
    work(tmp_path / "timed" / "out")
    took = time.monotonic() - began
    chance = random.Random(kills)
    root, hidden = tmp_path / "root", 0
    out = root / "out"
    root.mkdir()
    before = old(out) if replacing else None
    died = 0
    for _ in range(kills):
        died += killed(lambda: work(out), chance.uniform(0, 1.5 * took))
        held = small.tree(out) if out.exists() else None
        assert held in (before, truth)
        hidden += any(name.startswith(".out.") for name in os.listdir(root))
        if held == truth:
            work(out)  # which sweeps what was left of the one that it replaced
            assert os.listdir(root) == ["out"]
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
            before = old(out) if replacing else None
    work(out)
    assert os.listdir(root) == ["out"]
    assert small.tree(out) == truth
    assert died > kills / 5
    assert hidden > kills / 10, "some died in the midst of it"


def test_ctrl_c_leaves_nothing(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(path: Path, parts: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowtide.export.model_directory.write_synced", pressed)
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path / "new" / "deep" / "out")
    assert not (tmp_path / "new").exists()


def test_two_processes_do_not_write_the_same_directory(work: Work, tmp_path: Path) -> None:
    with whole_directory(tmp_path / "out", replaces=False) as hidden:
        (hidden / "file").write_text("")
        with pytest.raises(OutputError, match="another lowtide process is writing"):
            work(tmp_path / "out")
    assert small.tree(tmp_path / "out") == {"file": b""}


def test_what_others_write_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def meanwhile() -> None:
        with whole_directory(tmp_path / "out", replaces=False) as hidden:
            (hidden / "ours").write_text("")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("")

    assert "out cannot be written: Directory not empty" in str(ended_with(meanwhile))
    assert small.tree(tmp_path) == {"out": None, "out/theirs": b""}


def test_a_link_to_a_directory_stays_a_link(work: Work, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    work(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").exists()
