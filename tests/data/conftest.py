"""Tokenizers for the data tests: a tiny one made here, and real ones where they are present."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lowtide.data.tokenizer import Tokenizer as LowtideTokenizer

ASSETS = Path(__file__).resolve().parents[2] / ".." / "shared" / "assets"
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


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


def write_tiny(directory: Path, template: str | None) -> Path:
    directory.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    specials = ("<eos>", "<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(name, special=True) for name in specials])
    backend.save(str(directory / "tokenizer.json"))
    config: dict[str, object] = {"bos_token": None, "eos_token": {"content": "<eos>"}}
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
