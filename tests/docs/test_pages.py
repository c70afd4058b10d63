"""Every command that README and the docs show is run, as it stands, in a directory of its own.

Fences marked `sh` and `python` are run; a server that a fence starts runs until the fence ends. The
directory holds what the pages call by name: a model directory and a data file, here the bundled
model and the demo's data. `make` targets are looked up in the Makefile instead: they set up an
environment, and `.ci/run` runs them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lowtide.demo.assets import asset_dir
from lowtide.demo.household import write_data
from lowtide.export.gguf_model import write_gguf

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MODELS = ("path/to/model",)

pytestmark = pytest.mark.docs


def fences(page: Path) -> list[tuple[str, str]]:
    """(language, content) of the page's runnable fences."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def commands(content: str) -> list[str]:
    """Lines of a shell fence, continuations joined, comments dropped."""
    joined = content.replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A user's directory: models and data under the names that the pages use."""
    for name in MODELS:
        shutil.copytree(asset_dir(), tmp_path / name)
    data = write_data(tmp_path / "data")
    shutil.copy(data / "train.jsonl", tmp_path / "my-data.jsonl")
    config = json.loads((asset_dir() / "config.json").read_text())
    tensors = load_file(asset_dir() / "model.safetensors")
    write_gguf(tmp_path / "model-q8_0.gguf", config, tensors.__getitem__, "q8_0", {})
    return tmp_path


def test_the_pages_show_commands() -> None:
    assert any(fences(page) for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of(page: Path, workplace: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cache = str(workplace / "cache")
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": cache}
    for language, content in fences(page):
        if language == "python":
            run = [sys.executable, "-c", content]
            result = subprocess.run(run, cwd=workplace, env=environment, **CAPTURE)
            assert result.returncode == 0, f"{content}\n{result.stderr}"
            continue
        with contextlib.ExitStack() as servers:
            for command in commands(content):
                if command.startswith("make "):
                    assert command.split()[1] in targets, command
                    continue
                if command.startswith("lowtide serve "):
                    servers.enter_context(serving(command, cwd=workplace, env=environment))
                    continue
                result = subprocess.run(
                    ["bash", "-c", command], cwd=workplace, env=environment, **CAPTURE
                )
                assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


@contextlib.contextmanager
def serving(command: str, **where: Any) -> Iterator[None]:
    """A server, from the line that says where it listens until Ctrl-C."""
    server = subprocess.Popen(shlex.split(command), stdout=subprocess.PIPE, text=True, **where)
    try:
        assert server.stdout is not None
        assert "http://127.0.0.1:" in server.stdout.readline(), command
        yield
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0, command
    finally:
        server.kill()
        server.wait()


CAPTURE = {
    "capture_output": True, "text": True, "timeout": 300, "check": False,
    "stdin": subprocess.DEVNULL,
}  # fmt: skip
