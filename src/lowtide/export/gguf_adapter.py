"""Write an adapter as llama.cpp's LoRA file.

llama.cpp adds `(alpha / r) B (A x)` to the product of each tensor NAME with `NAME.lora_a (r, in)`
and `NAME.lora_b (out, r)`, with one alpha for the whole file and r the rank of each pair. Rows of B
are in the order of the rows of the model file's tensor. An adapter whose `s r` is not the same
everywhere (rsLoRA with several ranks, alphas by module) has what differs folded into B.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lowtide.errors import AdapterError, listed
from lowtide.model.adapter import Adapter, LoraConfig
from lowtide.model.decoder import Decoder
from lowtide.model.families import read_config
from lowtide.model.gguf.tensors import GgufTensor, entry_for, gguf_tensors

from .gguf_model import Place, write_file

ADAPTER_DTYPES = ("f32", "f16")


class WrittenAdapter(NamedTuple):
    """What a LoRA file holds.

    Attributes:
        path: the file.
        nbytes: its size.
        architecture: that it is for.
        alpha: `adapter.lora.alpha`.
        tensors: pairs of matrices.
        scaled: by name in the file, what B was multiplied by where its scale is not alpha / r.
    """

    path: Path
    nbytes: int
    architecture: str
    alpha: float
    tensors: int
    scaled: dict[str, float]


def write_gguf_adapter(path: Path, model: Decoder, adapter: Adapter, dtype: str) -> WrittenAdapter:
    """Write an adapter for llama.cpp.

    Args:
        path: the file; whatever it held stays until the new content is complete.
        model: the adapter's base.
        adapter: fits it.
        dtype: of ADAPTER_DTYPES.

    Returns:
        What was written.

    Raises:
        AdapterError: llama.cpp has no such adapter, or no place for some of its tensors; nothing
            was written.
        ModelError: llama.cpp does not know the model's family, or a number is not finite in dtype.
        OutputError: the disk is full or the directory cannot be written.
    """
    if adapter.config.use_dora:
        raise AdapterError(
            "the adapter is DoRA (use_dora), and llama.cpp's adapters have no magnitudes: without "
            "them it would be another function. Write the merged model instead: `lowtide merge "
            "... --out model.gguf`. Nothing was written."
        )
    architecture = entry_for(model.spec.model_type).architecture
    names = gguf_tensors(read_config(model.directory))
    there = {
        (layer, linear): names[f"model.layers.{layer}.{linear}.weight"]
        for layer, linear, _ in adapter.config.adapted(model.spec)
    }
    homeless = [
        f"{linear} in block {layer}" for (layer, linear), one in there.items() if not one.name
    ]
    if homeless:
        raise AdapterError(
            f"llama.cpp's architecture {architecture!r} has no tensors for these modules, which "
            f"the adapter is on:\n{listed(homeless)}\nTrain without them (--target-modules). "
            "Nothing was written."
        )
    alphas = {place: _alpha(adapter.config, *place) for place in there}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    factors = {place: one / alpha for place, one in alphas.items()}
    places = [
        one for place in there for one in _pair(adapter, place, there[place], factors[place], dtype)
    ]
    metadata: dict[str, Any] = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    nbytes = write_file(path, architecture, metadata, places)
    scaled = {there[place].name: factor for place, factor in factors.items() if factor != 1.0}
    return WrittenAdapter(path, nbytes, architecture, alpha, len(there), scaled)


def _alpha(config: LoraConfig, layer: int, linear: str) -> float:
    """What llama.cpp must divide by the rank; roundings of the scale's own division are dropped."""
    return float(f"{config.scale(layer, linear) * config.rank(layer, linear):.12g}")


def _pair(
    adapter: Adapter, place: tuple[int, str], there: GgufTensor, factor: float, dtype: str
) -> list[Place]:
    """`NAME.lora_a` and `NAME.lora_b`, read when they are written."""
    from gguf import GGMLQuantizationType

    kind = GGMLQuantizationType[dtype.upper()]
    rows, columns = there.shape
    rank = adapter.config.rank(*place)
    a = GgufTensor(f"{there.name}.lora_a", (rank, columns))
    b = GgufTensor(f"{there.name}.lora_b", (rows, rank), there.heads)
    return [
        Place(a, kind, partial(_matrix, adapter, place, None)),
        Place(b, kind, partial(_matrix, adapter, place, factor)),
    ]


def _matrix(adapter: Adapter, place: tuple[int, str], factor: float | None) -> Tensor:
    """B times a factor, or A."""
    lora = adapter.lora(*place, dropout_seed=None)
    assert lora is not None
    return lora.a if factor is None else lora.b * factor
