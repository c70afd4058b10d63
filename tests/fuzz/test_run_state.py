"""Checkpoints of a run that are not as they were written, or were written by somebody else."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
from hypothesis import strategies as st
from judging import QUICK, Judge, fuzz
from mutate import broken, documents, texts
from safetensors_files import Parts, files
from small import SENTENCES, run, write_jsonl, write_small_model

from lowtide.errors import LowtideWarning
from lowtide.train import checkpoints
from lowtide.train.checkpoints import FOLDER, STATE_FILE, Checkpoints, DamagedError
from lowtide.train.resume import settle


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four updates, with checkpoints after two and four."""
    root = tmp_path_factory.mktemp("run")
    model = write_small_model(root / "model")
    data = write_jsonl(root / "train.jsonl", [{"text": text} for text in SENTENCES])
    outcome = run(
        "train", "--model", model, "--data", data, "--adapter-path", root / "out", "--iters", 4,
        "--save-every", 2, "--max-seq-length", 32, "--optimizer", "adamw",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert Checkpoints(root / "out").steps()[:2] == [4, 2]
    return root / "out"


def _damaged(data: st.DataObject, judge: Judge, tmp_path: Path, good: Path) -> None:
    """One file of the newest checkpoint: the one before is taken, unless nothing changed."""
    root = tmp_path / "run"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(good, root)
    newest = root / FOLDER / "step-4"
    name = data.draw(st.sampled_from(sorted(path.name for path in newest.iterdir())))
    was = (newest / name).read_bytes()
    if name.endswith(".safetensors"):
        raw = data.draw(files(Parts(newest / name)))
    else:
        raw = data.draw(texts(json.loads(was)) | broken(was))
    (newest / name).write_bytes(raw)
    whole = [Checkpoints(good).path(step) for step in (4, 2)]

    def use() -> None:
        found, told = Checkpoints(root).newest()
        assert found is not None
        assert found.state == checkpoints.Checkpoint.read(whole[len(told)]).state
        if name != STATE_FILE:
            assert len(told) == (raw != was)

    judge(use)


test_checkpoints, test_many_checkpoints = fuzz(_damaged, st.data(), QUICK, 3_000)


def _forged(data: st.DataObject, judge: Judge, tmp_path: Path, good: Path) -> None:
    """A state with another content and the checksum of that."""
    root = tmp_path / "run"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(good, root)
    path = root / FOLDER / "step-4" / STATE_FILE
    document = json.loads(path.read_bytes())
    document.pop("sha256")
    changed = data.draw(documents(document, ("format", "state", "files", "settings")))
    if isinstance(changed, dict):
        changed["sha256"] = checkpoints._checksum(changed)
    path.write_text(json.dumps(changed), encoding="utf-8")

    def use() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LowtideWarning)
            settle({"resume": True, "adapter_path": str(root)})
            found, _ = Checkpoints(root).newest()
            assert found is not None

    judge(use)


test_forged_states, test_many_forged_states = fuzz(_forged, st.data(), QUICK, 3_000)


def test_a_state_that_is_no_object(tmp_path: Path) -> None:
    """The checksum of a list is no way around the checks."""
    (tmp_path / STATE_FILE).write_text("[1]")
    with pytest.raises(DamagedError, match="is not whole"):
        checkpoints.Checkpoint.read(tmp_path)
