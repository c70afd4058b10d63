"""Tiny models of every family that llama.cpp knows, and what llama.cpp computes of them.

    python tests/export/gguf_models.py

writes `golden/llama_cpp_logits.json` anew: for each case the digest of the F32 GGUF file that
lowtide writes, and some of the logits that llama.cpp computes from it. It needs llama-cpp-python.
Quick tests hold lowtide's own logits to these numbers; slow ones ask llama.cpp again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowtide.errors import ModelError
from lowtide.export.gguf_model import write_gguf
from lowtide.model.families import FAMILIES, spec_from_config
from lowtide.model.families.common import tiny
from lowtide.model.gguf.write import gguf_model
from lowtide.weights.writer import write_safetensors

GOLDEN = Path(__file__).parent / "golden" / "llama_cpp_logits.json"
TOKENS = 23
KEPT = 5
"""Every fifth position and every fifth logit are kept."""
_SIXTY = {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
_LINEAR = {"rope_type": "linear", "factor": 2.5}
_LLAMA3 = FAMILIES["llama"].examples[0]["rope_scaling"]
_LONG = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4],
    "long_factor": [1.3, 2.0, 3.0, 4.0, 5.0],
}
_WINDOWS = {"num_hidden_layers": 3, "head_dim": 14, "query_pre_attn_scalar": 14}
_UNTIED = {"tie_word_embeddings": False}
_MORE: dict[str, dict[str, Any]] = {
    "llama-yarn": {"rope_scaling": _YARN, **_SIXTY},
    "qwen2-square": _SIXTY,
    "qwen2-yarn": {"rope_scaling": _YARN, **_UNTIED, **_SIXTY},
    "qwen3-yarn": {"rope_scaling": _YARN, **_UNTIED, "head_dim": 22},
    "granite-linear": {"attention_multiplier": 0.2, "rope_scaling": _LINEAR, **_SIXTY},
    "granite-llama3": {"attention_multiplier": 0.2, "rope_scaling": _LLAMA3, "head_dim": 10},
    "olmo2-untied": {**_UNTIED, **_SIXTY},
    "olmo2-yarn": {"rope_scaling": _YARN, **_UNTIED, **_SIXTY},
    "smollm3-wide-heads": {"num_hidden_layers": 5, "head_dim": 10, "rope_scaling": _LINEAR},
    "phi3-untied": {**_UNTIED, **_SIXTY},
    # llama.cpp takes the long factors where its context is longer than this, we where the text is.
    "phi3-short": {
        "original_max_position_embeddings": 300, "rope_scaling": _LONG, **_SIXTY,
    },
    "gemma-linear": {"head_dim": 14, "rope_scaling": _LINEAR},
    "gemma2-caps": {
        **_WINDOWS, "sliding_window": 7,
        "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5,
    },
    # The family's widest model has this many layers, and a scale of scores of its own.
    "gemma2-widest": {**_WINDOWS, "num_hidden_layers": 46, "query_pre_attn_scalar": 9,
                      "sliding_window": 7},
    "gemma3_text-caps": {
        **_WINDOWS, "sliding_window_pattern": 3, "sliding_window": 6, "rope_theta": 1e6,
        "rope_local_base_freq": 1e3, "final_logit_softcapping": 3.0,
    },
    "gemma3_text-no-window": {**_WINDOWS, "layer_types": ["full_attention"] * 3},
    "gemma3_text-windows": {**_WINDOWS, "sliding_window": 6},
}  # fmt: skip


def _expressible(config: dict[str, Any]) -> bool:
    try:
        gguf_model(config)
    except ModelError:
        return False
    return True


def cases() -> dict[str, dict[str, Any]]:
    """Configs by name: the registry's examples that llama.cpp can express, and more."""
    found = {
        f"{name}-{place}": dict(config)
        for name, family in FAMILIES.items()
        if family.gguf is not None
        for place, config in enumerate(family.examples)
        if _expressible(dict(config))
    }
    more = {name: tiny(model_type=name.split("-")[0], **fields) for name, fields in _MORE.items()}
    return {**found, **more}


def tolerance(name: str) -> float:
    """What llama.cpp's own arithmetic leaves, relative.

    Its GELU is a table over float16: 2^-11 in each value that it gives, in each of some layers.
    Else it is float32, as ours.
    """
    return 2.0**-11 * 2 if name.startswith("gemma") else 5e-6


def write_model(directory: Path, config: dict[str, Any]) -> Path:
    """A model directory with random weights, the same on every machine."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(directory / "model.safetensors", weights(config))
    return directory


def weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights by Hugging Face name, so that logits are of order 1."""
    random = np.random.Generator(np.random.PCG64(7))
    spec = spec_from_config(config)
    found = {}
    for name, shape in spec.tensor_shapes().items():
        noise = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
        if "norm" in name:
            found[name] = 1.0 - spec.norm_offset + 0.3 * noise
        elif len(shape) == 1:
            found[name] = 0.3 * noise
        else:
            found[name] = noise * (0.5 if "embed" in name else shape[1] ** -0.5)
    return found


def ids_of(config: dict[str, Any]) -> list[int]:
    """A text of the model."""
    random = np.random.Generator(np.random.PCG64(8))
    return [int(one) for one in random.integers(0, spec_from_config(config).vocab_size, TOKENS)]


def llama_cpp_logits(path: Path, ids: list[int]) -> Tensor:
    """What llama.cpp computes, with its keys and values in float32."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=64, logits_all=True, type_k=0, type_v=0, flash_attn=False,
        n_threads=1, n_gpu_layers=0, verbose=False,
    )  # fmt: skip
    try:
        model.reset()
        model.eval(ids)
        return torch.from_numpy(np.array(model.scores[: len(ids)]))
    finally:
        model.close()


def kept(logits: Tensor) -> Tensor:
    """Those that the golden file keeps."""
    return logits[::KEPT, ::KEPT].float()


def relative(ours: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


def digest(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Write the golden file."""
    golden: dict[str, Any] = {}
    with TemporaryDirectory() as scratch:
        for name, config in cases().items():
            tensors, path = weights(config), Path(scratch) / f"{name}.gguf"
            write_gguf(path, config, tensors.__getitem__, "f32", {})
            logits = kept(llama_cpp_logits(path, ids_of(config)))
            rows = [[float(f"{one:.7g}") for one in row] for row in logits.tolist()]
            golden[name] = {"sha256": digest(path), "logits": rows}
    lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in golden.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
