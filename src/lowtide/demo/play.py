"""The demo plays the user: a household teaches the bundled model its own words.

Training and the comparison of methods run through the same commands that a user types, each in a
process of its own, so that what is reported is what a user would see.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.command import lowtide_command
from lowtide.data.tokenizer import Tokenizer
from lowtide.errors import KINDS, LowtideError
from lowtide.infer.generate import generate
from lowtide.model.adapter import Adapter
from lowtide.model.decoder import Decoder

from .assets import asset_dir
from .household import FINE_TUNING
from .requests import Example, exact_match

_ANSWER_TOKENS = 64
_MAX_SEQ_LENGTH = 128


@dataclass(frozen=True)
class Scored:
    """Answers to some requests, and the share that matches exactly."""

    answers: list[str]
    accuracy: float


def score(
    model: Decoder, adapter: Adapter | None, tokenizer: Tokenizer, examples: Sequence[Example]
) -> Scored:
    """Answer every request greedily and compare with the expected call, to the character.

    Args:
        model: the bundled model.
        adapter: LoRA matrices, or None for the base model.
        tokenizer: the model's.
        examples: requests and expected answers.

    Returns:
        The answers and the accuracy.
    """
    answers = []
    for example in examples:
        message = [{"role": "user", "content": example.prompt}]
        text = tokenizer.render_chat(message, add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        ids = generate(model, adapter, prompt, _ANSWER_TOKENS, stop_ids=tokenizer.stop_ids)
        answers.append(tokenizer.decode(list(ids)))
    pairs = zip(answers, examples, strict=True)
    hits = sum(exact_match(answer, example.completion) for answer, example in pairs)
    return Scored(answers, hits / len(examples))


def train_arguments(data: Path, adapter_path: Path) -> list[str]:
    """The `lowtide train` command line of the demo, without the program's name."""
    tuning = FINE_TUNING
    return [
        "train",
        f"--model={asset_dir()}",
        f"--data={data}",
        f"--adapter-path={adapter_path}",
        "--mask-prompt",
        f"--max-seq-length={_MAX_SEQ_LENGTH}",
        f"--iters={tuning.iters}",
        f"--batch-size={tuning.batch_size}",
        f"--learning-rate={tuning.learning_rate}",
        f"--lora-r={tuning.r}",
        f"--lora-alpha={tuning.lora_alpha}",
        "--val-batches=0",
        "--steps-per-report=60",
        "--overwrite",
    ]


def bench_arguments(method: str) -> list[str]:
    """`lowtide bench step` on the bundled model at the demo's batch size."""
    return [
        "bench",
        "step",
        f"--model={asset_dir()}",
        f"--method={method}",
        f"--seq-len={_MAX_SEQ_LENGTH}",
        f"--batch-size={FINE_TUNING.batch_size}",
        "--optimizer=adamw",
        "--steps=2",
    ]


def run_command(arguments: Sequence[str], say: Callable[[str], None] | None) -> dict[str, Any]:
    """Run a lowtide command in a child process and return its JSON document.

    Args:
        arguments: the command line without the program's name.
        say: receives each line of the child's text; None drops them.

    Returns:
        The document.

    Raises:
        LowtideError: the command failed; of the kind and with the message that it gave.
    """
    with subprocess.Popen(
        lowtide_command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        last = ""
        for line in child.stderr:
            last = line.rstrip() or last
            if say is not None:
                say(line.rstrip())
        output = child.stdout.read()
    try:
        document: dict[str, Any] = json.loads(output)
    except ValueError as error:
        raise LowtideError(f"`lowtide {arguments[0]}` stopped: {last}") from error
    if child.returncode != 0:
        kind = KINDS.get(str(document.get("kind")), LowtideError)
        raise kind(document.get("error", f"`lowtide {arguments[0]}` failed: {last}"))
    return document
