"""Roughly what a case will take, so that one that cannot fit is refused before it starts.

Counted from the shape in float32, as each method allocates; meant to be right within a factor of
about one and a half, not to be reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowtide.demo.assets import asset_dir
from lowtide.memory.adapters import AdapterShape
from lowtide.model.adapter import ALL_LINEAR, LoraConfig
from lowtide.model.families import read_config, spec_from_config
from lowtide.model.gguf.home import home_of
from lowtide.model.spec import ModelSpec

from .shapes import DEMO_MODEL, shape_config

_PROCESS = 250_000_000
"""Python, torch and the rest of the program."""
_PEER_PROCESS = 800_000_000
_TILES = 32_000_000
_STATE = {"sgd": 0, "lion": 1, "adamw": 2, "adafactor": 0}
"""Floats per adapter parameter that an optimiser keeps."""


def needed_bytes(kind: str, case: Mapping[str, Any]) -> int:
    """Private memory that a case's process will take at its peak, roughly.

    Args:
        kind: of the case.
        case: its settings.

    Returns:
        Bytes.

    Raises:
        ModelError: the model's config.json cannot be read or used.
    """
    spec = _spec(case)
    tokens = int(case.get("seq_len") or case.get("max_seq_length") or 256)
    tokens *= int(case.get("batch_size") or 1)
    if kind == "peer":
        return _PEER_PROCESS + _peer(spec, tokens, bool(case.get("checkpointing")))
    config = LoraConfig(
        int(case.get("lora_r") or 8), target_modules=case.get("target_modules") or ALL_LINEAR
    )
    adapter = AdapterShape(spec, config).parameters
    kept = 1 + _STATE.get(str(case.get("optimizer")), 0) + (1 if kind == "quality" else 0)
    method = "mebp" if kind == "quality" else str(case.get("method", "mesp"))
    return _PROCESS + _TILES + 4 * (adapter * kept + _floats(spec, tokens, method, case))


def _spec(case: Mapping[str, Any]) -> ModelSpec:
    if case.get("shape"):
        return spec_from_config(shape_config(case["shape"]))
    bundled = case["model"] == DEMO_MODEL
    return spec_from_config(read_config(asset_dir() if bundled else home_of(Path(case["model"]))))


def _floats(spec: ModelSpec, tokens: int, method: str, case: Mapping[str, Any]) -> int:
    """Floats of one step, the adapter aside."""
    inputs = tokens * spec.hidden_size * (spec.num_layers + 1)
    work = 12 * tokens * spec.hidden_size
    if method == "mezo":
        return work
    if method in ("mesp", "lcsb"):
        return inputs + work
    graph = tokens * _graph_width(spec) + 2 * spec.hidden_size * spec.intermediate_size
    logits = 3 * tokens * spec.vocab_size
    if method == "autograd":
        return spec.num_layers * graph + spec.n_parameters + logits
    return inputs + graph + (logits if case.get("mebp_loss") == "full" else work)


def _graph_width(spec: ModelSpec) -> int:
    """Floats that autograd keeps of one token in one block."""
    return 12 * spec.hidden_size + 5 * spec.intermediate_size


def _peer(spec: ModelSpec, tokens: int, checkpointing: bool) -> int:
    blocks = 1 if checkpointing else spec.num_layers
    kept = spec.num_layers * spec.hidden_size + blocks * _graph_width(spec) + 3 * spec.vocab_size
    return 4 * (2 * spec.n_parameters + tokens * kept)
