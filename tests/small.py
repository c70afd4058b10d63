"""A model of 30,000 parameters with its own tokenizer, and ways to run commands on it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lowtide.cli.main import main
from lowtide.model.families import spec_from_config
from lowtide.weights.writer import write_safetensors

POSITIONS = 64
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = [f"The number {i} comes after {i - 1}, they say." for i in range(1, 25)]


def write_small_model(directory: Path, **changes: Any) -> Path:
    """config.json with `changes`, random weights that fit it, and the tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **changes}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(directory / "model.safetensors", small_weights(config))
    write_small_tokenizer(directory)
    return directory


def small_weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random weights by name; norms are ones."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, shape in spec_from_config(config).tensor_shapes().items():
        scale = 0.5 if "embed" in name else shape[-1] ** -0.5
        noise = torch.randn(shape, generator=generator) * scale
        weights[name] = torch.ones(shape) if "norm" in name else noise
    return weights


def write_small_tokenizer(directory: Path, template: bool = True) -> None:
    """One token for each byte, with BOS, EOS and ChatML's two marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": marks[0], "eos_token": marks[1]}
    if template:
        config["chat_template"] = CHATML
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Rows as JSON Lines; strings are written as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout."""
        document: dict[str, Any] = json.loads(self.out)
        return document


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """On so small a model a second thread costs far more than it does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(*arguments: object) -> Outcome:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with one_thread(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


def command(*arguments: object) -> list[str]:
    """The command line of the installed program, as a user's shell would start it."""
    program = Path(sys.executable).with_name("lowtide")
    return [str(program), *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """The environment of a child: one thread, and `more`."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def run_process(*arguments: object, **options: Any) -> Outcome:
    """Run a command in a process of its own."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=120, check=False,
        env=environment(), **options,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def tree(directory: Path) -> dict[str, bytes | None]:
    """Every path below a directory, hidden ones too, and the bytes of the files."""
    found: dict[str, bytes | None] = {}
    for parent, directories, files in os.walk(directory):
        for name in directories:
            found[os.path.relpath(os.path.join(parent, name), directory)] = None
        for name in files:
            path = Path(parent, name)
            held = path.read_bytes() if path.is_file() else None
            found[os.path.relpath(path, directory)] = held
    return found
