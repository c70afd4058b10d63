"""The tensors of a GGUF file: their names, and what differs in their numbers from Hugging Face's.

Names come from the `gguf` package's own tables. Rows of q and k lie, in families whose entry says
`pairs`, in the order in which llama.cpp rotates neighbours: columns `2 i` and `2 i + 1` of a head
there are `i` and `i + head_dim / 2` here. A norm that counts from one here is stored whole there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowtide.errors import ModelError
from lowtide.model.families import FAMILIES, spec_from_config
from lowtide.model.spec import ModelSpec

from .entry import Gguf

_SUFFIXES = (".weight", ".bias")


class GgufTensor(NamedTuple):
    """Where a tensor lies in a GGUF file, and how it differs.

    Attributes:
        name: in the file.
        shape: rows first.
        heads: how many heads' rows are in the order of `row_order`; 0 where rows are as here.
        offset: added to the numbers in the file.
    """

    name: str
    shape: tuple[int, ...]
    heads: int = 0
    offset: float = 0.0


def gguf_tensors(config: Mapping[str, Any]) -> dict[str, GgufTensor]:
    """Every tensor of a model by its Hugging Face name.

    Args:
        config: a parsed config.json, as `config_from_metadata` gives it, or a directory's.

    Returns:
        What each is called in the file, in the order of `ModelSpec.tensor_shapes`.

    Raises:
        ModelError: the config is not one that lowtide reads, or llama.cpp does not know its family.
    """
    spec = spec_from_config(config)
    return tensors_of(spec, entry_for(spec.model_type))


def entry_for(model_type: str) -> Gguf:
    """The GGUF entry of a family.

    Args:
        model_type: one that the registry knows.

    Returns:
        Its entry.

    Raises:
        ModelError: llama.cpp does not know the family.
    """
    entry = FAMILIES[model_type].gguf
    if entry is None:
        known = sorted(name for name, family in FAMILIES.items() if family.gguf is not None)
        raise ModelError(
            f"llama.cpp does not know models of type {model_type!r}, so there is no GGUF file of "
            f"one; it knows {', '.join(known)}."
        )
    return entry


def tensors_of(spec: ModelSpec, entry: Gguf) -> dict[str, GgufTensor]:
    """As `gguf_tensors`, of a spec.

    Args:
        spec: of the model.
        entry: of its family.

    Returns:
        As `gguf_tensors`; a tensor that the architecture has no name for is called `""`.
    """
    import gguf

    architectures = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[entry.architecture], spec.num_layers)
    norms = {f"{name}.weight" for name in spec.norms if name} | set(spec.vector_shapes())
    found = {}
    for name, shape in spec.tensor_shapes().items():
        part = name.rpartition(".")[0].rpartition(".")[2]
        inner = name.split(".", 3)[-1]
        is_norm = inner in norms or name == "model.norm.weight"
        heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}.get(part, 0)
        found[name] = GgufTensor(
            name=names.get_name(name, _SUFFIXES) or "",
            shape=shape,
            heads=heads if entry.pairs else 0,
            offset=spec.norm_offset if is_norm else 0.0,
        )
    return found


def row_order(rows: int, heads: int) -> Tensor:
    """Which row of the file each row here is.

    Args:
        rows: of q or k.
        heads: that they divide into.

    Returns:
        `(rows,)` int64: row `i` here is row `order[i]` in the file. Its `argsort` is the way back.
    """
    return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(rows)
