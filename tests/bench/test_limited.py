"""`benchmarks/limited.py`: a run in a control group, and what it says where there are none."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from small import write_small_model

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "limited.py"


@pytest.fixture(scope="module")
def limited() -> ModuleType:
    spec = importlib.util.spec_from_file_location("limited", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["limited"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_it_holds_nothing_of_torch() -> None:
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_no_memory_controller(limited: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(limited.Unavailable, match="has no memory controller"):
        with limited.memory_group(10**9, tmp_path):
            pass


def test_a_hierarchy_that_cannot_be_written(limited: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("1")
    (tmp_path / "memory" / f"lowtide-{os.getpid()}").write_text("in the way")
    with pytest.raises(limited.Unavailable, match="no group can be made in"):
        with limited.memory_group(10**9, tmp_path):
            pass


def test_the_refusal_is_a_message_and_an_exit_code(
    limited: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise limited.Unavailable("here is why")

    monkeypatch.setattr(limited, "compare", refuse)
    assert limited.main(["--memory-limit", "1GB", "--", "--model", "m"]) == 2
    assert capsys.readouterr().err == (
        "limited.py: no memory control group can be had: here is why.\n"
    )


@pytest.mark.parametrize(("text", "size"), [("384MiB", 402653184), ("1GB", 10**9), ("7", 7)])
def test_sizes(limited: ModuleType, text: str, size: int) -> None:
    assert limited.size_in_bytes(text) == size


def test_one_bit_of_one_loss_is_told(limited: ModuleType) -> None:
    one = {"adapter_sha256": "a", "warmup_step": {"loss": 1.5}, "steps": [{"loss": 0.1}]}
    other = {**one, "steps": [{"loss": 0.1 + 2**-56}]}
    assert limited.same_result(one, dict(one))
    assert not limited.same_result(one, other)
    assert not limited.same_result(one, {**one, "adapter_sha256": "b"})


def test_a_run_here_or_the_refusal(tmp_path: Path) -> None:
    """Where control groups can be had the whole script runs; elsewhere it says why not."""
    model = write_small_model(tmp_path / "model")
    flags = ["--model", str(model), "--seq-len", "16", "--steps", "1"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--memory-limit", "1GiB", "--json", "--", *flags],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 2:
        assert "no memory control group can be had: " in done.stderr
        assert "Traceback" not in done.stderr
        return
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["equal"] is True
    assert result["group"]["oom_kills"] == 0
    assert 0 < result["group"]["peak_bytes"] <= 2**30
    assert not list(Path("/sys/fs/cgroup").glob("**/lowtide-*"))
