"""`lowtide bench peers`: what a user would run instead, each in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.config import setting

from .case import Case, Runner, Summary
from .child import run_child
from .results import file_name
from .shapes import ShapeSettings, shape_of

_PEERS = (
    ("trl+peft", True),
    ("trl+peft", False),
    ("trl+peft+patch", True),
    ("mlx-lm", True),
)
"""Name, and whether it recomputes activations in the backward; `patch` is integrations.hf's."""


@dataclass(frozen=True, kw_only=True)
class PeersSettings(ShapeSettings):
    """Settings of `lowtide bench peers`."""

    out: str = setting(help="directory for the results", filled=True)
    model: str = setting("qwen2.5-0.5b", help="model directory or a shape", filled=True)
    seq_len: int = setting(256, help="tokens per sequence", minimum=2)
    steps: int = setting(2, help="measured steps of a round, after one that warms up", minimum=1)
    rounds: int = setting(3, help="how often each is measured, in turns", minimum=1)


def bench_peers(settings: PeersSettings, say: Callable[[str], None]) -> Summary:
    """Measure the peers that are installed; those that are not are recorded as skipped.

    Args:
        settings: of the command.
        say: told of progress.

    Returns:
        How each case ended.

    Raises:
        ModelError: there is no such shape or model.
        OutputError: the directory cannot be written.
    """
    directory = Path(settings.out).expanduser()
    cases = peer_cases(settings.model, settings.seq_len, settings.steps, settings.rounds)
    return Runner(directory, {"peer": run_peer}, say, settings.cache_dir).run(cases)


def peer_cases(model: str, seq_len: int, steps: int, rounds: int = 1) -> list[Case]:
    """The peers' cases: LoRA r = 8 on all linears, SGD, batch 1; mlx-lm in the stored bfloat16.

    Args:
        model: a shape or a model directory.
        seq_len: tokens per sequence.
        steps: measured steps of a round.
        rounds: how often each case is measured.

    Returns:
        One case for each peer and way of using it.

    Raises:
        ModelError: there is no such shape or model.
    """
    shape = shape_of(model)
    cases = []
    for peer, checkpointing in _PEERS:
        settings = {
            "shape": shape,
            "model": model,
            "peer": peer,
            "checkpointing": checkpointing,
            "seq_len": seq_len,
            "batch_size": 1,
            "lora_r": 8,
            "target_modules": "all-linear",
            "optimizer": "sgd",
            "compute_dtype": "bfloat16" if peer == "mlx-lm" else "float32",  # as users run it
            "steps": steps,
        }
        way = "checkpointing" if checkpointing else "no-checkpointing"
        named = file_name("peers", Path(model).name, f"t{seq_len}", peer, way)
        cases.append(Case(named, "peers", "peer", settings, rounds))
    return cases


def run_peer(settings: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Measure one peer in a fresh process.

    Args:
        settings: of the case, `model` being a directory.
        scratch: its directory for temporary files.

    Returns:
        Its figures.

    Raises:
        SkippedError: the peer is not installed.
        LowtideError: it failed or was killed.
    """
    command = [sys.executable, "-P", "-m", "lowtide.bench.peer_child", json.dumps(dict(settings))]
    return run_child(command, scratch)
