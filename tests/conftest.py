"""Fixtures that several test rooms share."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import helpers
import pytest
import small
import torch

from lowtide.model.gguf import home
from lowtide.model.gguf.unpack import unpack
from lowtide.weights.gguf.file import GgufFile

# The tensors here are tiny: handing them to a second thread costs several times what it saves, and
# far more where other programs keep the cores busy.
torch.set_num_threads(1)
# A shell starts what it runs in the background with SIGINT and SIGQUIT ignored, and what is ignored
# stays so in the processes that tests start and then interrupt.
for _number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests tokenise and quantise goes elsewhere, also in processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes each of `helpers.SHAPES` once for each stored dtype; returns its directory."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            directory = tmp_path_factory.mktemp(name)
            made[name, dtype] = helpers.write_model(directory, helpers.SHAPES[name], dtype)
        return made[name, dtype]

    return make


@pytest.fixture
def unpacked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What GGUF files say is written in this process: a child takes a second to start."""

    def here(path: Path, directory: Path) -> None:
        unpack(GgufFile.open(path), directory)

    monkeypatch.setattr(home, "unpack_in_child", here)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 30,000 parameters, not to be written to. Rooms may have another of that name."""
    return small.write_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences to train it on."""
    rows = [{"text": sentence} for sentence in small.SENTENCES]
    return small.write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)
