"""Adapters on tiny models of every family that llama.cpp knows, and what it computes with them.

    python tests/export/gguf_adapters.py

writes `golden/llama_cpp_adapters.json` anew: for each case the digest of the LoRA file that lowtide
writes, and some of the logits that llama.cpp computes with it. It needs llama-cpp-python. Quick
tests hold lowtide's own logits to these numbers; slow ones ask llama.cpp again.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from gguf_models import cases, digest, ids_of, kept, write_model
from torch import Tensor

import lowtide as lt
from lowtide.export.gguf import export_adapter, export_model
from lowtide.export.gguf_adapter import WrittenAdapter

GOLDEN = Path(__file__).parent / "golden" / "llama_cpp_adapters.json"
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "some": {"target_modules": "o_proj,down_proj", "layers_to_transform": [1]},
    "patterns": {
        "use_rslora": True, "rank_pattern": {"o_proj": 5, "down_proj": 2},
        "alpha_pattern": {"down_proj": 3.7, "layers.1.self_attn.o_proj": 2.0},
    },
}  # fmt: skip


def adapter_cases() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Config of the model and settings of the adapter by name."""
    models = cases()
    first = {name.split("-")[0]: name for name in reversed(models)}
    chosen = {name: models[name] for name in sorted({*first.values(), "llama-yarn"})}
    return {
        f"{name}-{kind}": (config, settings)
        for name, config in chosen.items()
        for kind, settings in KINDS.items()
        if kind == "patterns" or name in ("llama-yarn", "phi3-0")
    }


def write_both(
    directory: Path, config: dict[str, Any], settings: dict[str, Any]
) -> tuple[Path, Path]:
    """Directories of a model and an adapter that is the same on every machine."""
    model = write_model(directory / "model", config)
    decoder = lt.load_model(model)
    adapter = lt.Adapter.create(decoder, lt.LoraConfig(**{"r": 3, "lora_alpha": 5.0, **settings}))
    random = np.random.Generator(np.random.PCG64(9))
    for _, parameter in adapter.items():
        noise = random.standard_normal(tuple(parameter.shape)).astype(np.float32)
        parameter.copy_(torch.from_numpy(noise * np.float32(0.2)))
    adapter.save(directory / "adapter")
    return model, directory / "adapter"


def exported(directory: Path, both: tuple[Path, Path], dtype: str = "f32") -> WrittenAdapter:
    """The LoRA file."""
    return export_adapter(*both, directory / "adapter.gguf", dtype=dtype)


def _llama_cpp(model: Path, lora: Path | None) -> Any:
    """llama.cpp, with its keys and values in float32."""
    import llama_cpp

    return llama_cpp.Llama(
        str(model), n_ctx=256, n_batch=64, logits_all=True, type_k=0, type_v=0, flash_attn=False,
        n_threads=1, n_gpu_layers=0, verbose=False, lora_path=None if lora is None else str(lora),
    )  # fmt: skip


def llama_cpp_logits(model: Path, ids: list[int], lora: Path | None) -> Tensor:
    """What llama.cpp computes."""
    found = _llama_cpp(model, lora)
    try:
        found.reset()
        found.eval(ids)
        return torch.from_numpy(np.array(found.scores[: len(ids)]))
    finally:
        found.close()


def llama_cpp_greedy(model: Path, prompt: list[int], count: int, lora: Path | None) -> list[int]:
    """The likeliest next tokens, one after another."""
    found = _llama_cpp(model, lora)
    try:
        found.reset()
        found.eval(prompt)
        ids = []
        for place in range(len(prompt) - 1, len(prompt) - 1 + count):
            ids.append(int(np.argmax(found.scores[place])))
            found.eval(ids[-1:])
        return ids
    finally:
        found.close()


def llama_cpp_text(model: Path, prompt: str, count: int, lora: Path | None) -> str:
    """A greedy continuation, through its own tokenizer."""
    found = _llama_cpp(model, lora)
    try:
        answer = found.create_completion(prompt, max_tokens=count, temperature=0.0)
        return str(answer["choices"][0]["text"])
    finally:
        found.close()


def main() -> None:
    """Write the golden file."""
    golden: dict[str, Any] = {}
    for name, (config, settings) in adapter_cases().items():
        with TemporaryDirectory() as scratch:
            place = Path(scratch)
            both = write_both(place, config, settings)
            export_model(both[0], place / "model.gguf", dtype="f32")
            lora = exported(place, both).path
            logits = kept(llama_cpp_logits(place / "model.gguf", ids_of(config), lora))
            rows = [[float(f"{one:.7g}") for one in row[::2]] for row in logits.tolist()]
            golden[name] = {"sha256": digest(lora), "logits": rows}
    lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in golden.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
