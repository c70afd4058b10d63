"""Tokenizers for the data tests: a tiny one made here, and real ones where they are present."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import CHATML, write_tiny

from lowtide import data
from lowtide.data.prepare import PrepareRequest
from lowtide.data.tokenizer import Tokenizer as LowtideTokenizer

ASSETS = Path(__file__).resolve().parents[2] / ".." / "shared" / "assets"


@pytest.fixture(scope="session")
def asset() -> Callable[[str], Path]:
    """The path of a file of real material; skips the test where it is absent."""

    def find(name: str) -> Path:
        path = ASSETS / name
        if not path.exists():
            pytest.skip(f"needs real material that is not here: ../shared/assets/{name}")
        return path

    return find


@pytest.fixture(scope="session")
def bare_room() -> str:
    """Code that makes `lowtide.data` importable without what `lowtide` itself imports."""
    return (
        "import sys, types; sys.modules['lowtide'] = types.ModuleType('lowtide'); "
        f"sys.modules['lowtide'].__path__ = {[str(Path(data.__file__).parents[1])]!r}\n"
    )


@pytest.fixture(scope="session")
def qwen_directory(asset: Callable[[str], Path]) -> Path:
    return asset("tokenizers/Qwen2.5-Instruct")


@pytest.fixture(scope="session")
def stories_directory(asset: Callable[[str], Path]) -> Path:
    return asset("models/stories260K/hf-llama")


@pytest.fixture(scope="session")
def qwen(qwen_directory: Path) -> LowtideTokenizer:
    return LowtideTokenizer.load(qwen_directory)


@pytest.fixture(scope="session")
def stories(stories_directory: Path) -> LowtideTokenizer:
    return LowtideTokenizer.load(stories_directory)


@pytest.fixture
def tiny_directory(tmp_path: Path) -> Path:
    """A tokenizer with one token for each byte, a few special ones and a ChatML template."""
    return write_tiny(tmp_path / "tiny", CHATML)


@pytest.fixture
def tiny(tiny_directory: Path) -> LowtideTokenizer:
    return LowtideTokenizer.load(tiny_directory)


@pytest.fixture
def tiny_plain(tmp_path: Path) -> LowtideTokenizer:
    """The same without a chat template."""
    return LowtideTokenizer.load(write_tiny(tmp_path / "tiny-plain", None))


@pytest.fixture
def request_for(tmp_path: Path, tiny_directory: Path) -> Callable[..., PrepareRequest]:
    """Makes requests for the tiny tokenizer."""

    def make(data: Path, **settings: Any) -> PrepareRequest:
        defaults: dict[str, Any] = {
            "tokenizer": tiny_directory,
            "cache": tmp_path / "cache",
            "max_seq_length": 64,
            "vocab_size": 259,
        }
        return PrepareRequest(data=data, **{**defaults, **settings})

    return make


@pytest.fixture
def write_rows() -> Callable[..., Path]:
    """Writes rows to a file as JSON Lines."""

    def write(path: Path, *rows: Any) -> Path:
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
