"""`--deterministic`: one seed gives the same bytes on one core and on two, and in a resumed run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
from runs import WEIGHTS, train
from test_resume import Watch

import lowtide as lt
from lowtide.errors import ConfigError
from lowtide.memory import available
from lowtide.train import fingerprint

# Large enough for a thread per core, which is what a run takes unless it is told otherwise.
WIDE = {"hidden_size": 256, "intermediate_size": 1600}
FEW = ("--iters", 3, "--max-seq-length", 64, "--batch-size", 2, "--learning-rate", 0.01)
FREE = [{"OMP_NUM_THREADS": "2"}, {"OMP_NUM_THREADS": "2", "LOWTIDE_PRODUCTS": "onednn"}]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_small_model(tmp_path_factory.mktemp("wide"), **WIDE)


def trained(out: Path, cores: int, *flags: object, **environment: str) -> bytes:
    """The adapter of a run in a process that may use so many cores."""
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    assert len(allowed) == cores, "this test needs two cores"
    done = subprocess.run(
        small.command("train", "--adapter-path", out, *flags), capture_output=True, text=True,
        check=False, env={**os.environ, **environment},
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return (out / WEIGHTS).read_bytes()


@pytest.mark.parametrize("threads", [(), ("--threads", 2)])
def test_one_core_and_two_give_the_same_bytes(
    threads: tuple[object, ...], wide: Path, data: Path, tmp_path: Path
) -> None:
    run = ("--model", wide, "--data", data, *FEW, "--deterministic", *threads)
    one = trained(tmp_path / "one", 1, *run, **FREE[0])
    assert trained(tmp_path / "two", 2, *run, **FREE[1]) == one
    assert lt.train(adapter_path=tmp_path / "one", resume=True, iters=3).steps == 3


def test_a_run_goes_on_to_the_byte_on_another_number_of_cores(
    wide: Path, data: Path, tmp_path: Path
) -> None:
    run = ("--model", wide, "--data", data, *FEW, "--deterministic")
    whole = trained(tmp_path / "whole", 2, *run, **FREE[0])
    trained(tmp_path / "parts", 2, *run, "--iters", 1, **FREE[0])
    assert trained(tmp_path / "parts", 1, "--resume", "--iters", 3, **FREE[1]) == whole


def test_left_to_itself_a_run_follows_the_cores(wide: Path, data: Path, tmp_path: Path) -> None:
    """Without the setting threads differ, and a run that goes on says so."""
    run = ("--model", wide, "--data", data, *FEW)
    trained(tmp_path / "out", 2, *run, **FREE[0])
    done = small.run_process("train", "--adapter-path", tmp_path / "out", "--resume", "--iters", 4)
    assert done.code == 0
    assert "not bit for bit as it would have: threads 2 then, 1 now" in done.err


def test_what_is_decided_is_in_run_yaml(model: Path, data: Path, tmp_path: Path) -> None:
    train(model, data, tmp_path / "out", deterministic=True)
    text = (tmp_path / "out" / "run.yaml").read_text()
    for line in ("deterministic: true", "threads: 1", "products: torch"):
        assert line in text


def test_other_arithmetic_is_refused(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    train(model, data, out, deterministic=True)
    before = small.tree(out)
    with pytest.raises(ConfigError, match=r"is --deterministic.*threads 1 then, 2 now"):
        lt.train(adapter_path=out, resume=True, iters=5, threads=2)
    monkeypatch.setattr(fingerprint.torch, "__version__", "9.0.0")
    with pytest.raises(ConfigError, match=r"torch .* then, 9\.0\.0 now.*--resume-anyway"):
        lt.train(adapter_path=out, resume=True, iters=5)
    torch.set_num_threads(1)
    assert small.tree(out) == before
    watch = Watch()
    with pytest.warns(match="not bit for bit"):
        lt.train(adapter_path=out, resume=True, iters=5, resume_anyway=True, observer=watch)


def test_tiles_that_a_budget_chose_are_part_of_it(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run = ("--model", model, "--data", data, *FEW, "--iters", 3)  # the budget is of a whole process
    trained(out, 1, *run, "--memory-budget", "400MB", "--deterministic")
    found = fingerprint.arithmetic("small")
    monkeypatch.setattr(sys.modules["lowtide.train.run"], "arithmetic", lambda tiles: found)
    with pytest.raises(ConfigError, match="tiles full then, small now"):
        lt.train(adapter_path=out, resume=True, iters=5)


def test_what_cannot_be_promised_is_refused(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available, "available_bytes", lambda: 1 << 30)
    with pytest.raises(ConfigError, match=r"50% is another budget.*Give a size"):
        train(model, data, tmp_path / "out", deterministic=True, memory_budget="50%")
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    with pytest.raises(ConfigError, match=r"OMP_THREAD_LIMIT=1.*or give --threads 1"):
        train(model, data, tmp_path / "out", deterministic=True, threads=2)
    assert not (tmp_path / "out").exists()
