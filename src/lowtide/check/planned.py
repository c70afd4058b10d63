"""The planner's prediction for a family against a measured step, in a fresh process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lowtide.bench.child import flags_of, run_child
from lowtide.command import lowtide_command
from lowtide.memory.plan import Workload, predict
from lowtide.methods import MethodOptions
from lowtide.model.adapter import LoraConfig
from lowtide.model.families import spec_from_config
from lowtide.weights.checkpoint import SINGLE_FILE
from lowtide.weights.writer import write_safetensors

_PLANNED_TOKENS = 256


@contextmanager
def larger(config: Mapping[str, Any]) -> Iterator[Path]:
    """A model of the same kind whose buffers are worth measuring, with random 16-bit weights.

    Args:
        config: of one of `Family.examples`.

    Yields:
        Its directory, which is removed afterwards.
    """
    inner = config.get("text_config") or config
    changed = {
        **inner,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "vocab_size": 8192,
        "num_attention_heads": 8 * inner["num_attention_heads"],
        "num_key_value_heads": 8 * inner["num_key_value_heads"],
    }
    whole = {**config, "text_config": changed} if "text_config" in config else changed
    with TemporaryDirectory() as scratch:
        directory, generator = Path(scratch), torch.Generator().manual_seed(0)
        weights = {
            name: (torch.randn(shape, generator=generator) * 0.02).bfloat16()
            for name, shape in spec_from_config(whole).tensor_shapes().items()
        }
        write_safetensors(directory / SINGLE_FILE, weights)
        (directory / "config.json").write_text(json.dumps(whole), encoding="utf-8")
        yield directory


def planned_and_measured(
    config: Mapping[str, Any], command: Callable[..., list[str]] = lowtide_command
) -> tuple[int, int]:
    """Peak bytes of a step of the larger model: predicted, and measured in a fresh process.

    Args:
        config: of one of `Family.examples`.
        command: makes the command line of a lowtide that knows the family.

    Returns:
        Both.
    """
    with larger(config) as directory:
        spec = spec_from_config(json.loads((directory / "config.json").read_text()))
        work = Workload(
            spec=spec, config=LoraConfig(r=8), method="mesp", optimizer="sgd", momentum=False,
            accumulates=False, lengths=(_PLANNED_TOKENS,),
        )  # fmt: skip
        predicted = predict(work, MethodOptions()).predicted_peak_bytes
        flags = flags_of(
            {
                "model": str(directory),
                "seq_len": _PLANNED_TOKENS,
                "steps": 2,
                "lora_r": work.config.r,
                "optimizer": work.optimizer,
            }
        )
        result = run_child(command("bench", "step", *flags), directory)
    return predicted, max(one["peak_anon_bytes"] for one in result["steps"])
