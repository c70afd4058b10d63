"""From a config.json to the metadata of a GGUF file, as far as llama.cpp can express it.

What is written is read again before anything reaches the disk: a spec that does not come back is
one that llama.cpp would run as another function, and is refused with the fields that differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowtide.errors import ModelError, listed, shown
from lowtide.model.families import spec_from_config
from lowtide.model.rope import inverse_frequencies
from lowtide.model.spec import LayerSpec, ModelSpec, RopeSpec

from .entry import FREQUENCY_FACTORS, LONG_FACTORS, SHORT_FACTORS, Gguf
from .read import config_from_metadata
from .tensors import GgufTensor, entry_for, tensors_of

_TOLERANCE = 1e-6  # of numbers that a file keeps in float32
_FIELDS = {
    "layers": ("sliding_window", "layer_types", "sliding_window_pattern", "no_rope_layers"),
    "ropes": (
        "rope_scaling",
        "rope_parameters",
        "rope_theta",
        "rope_local_base_freq",
        "partial_rotary_factor",
    ),
    "biased": ("attention_bias", "mlp_bias"),
    "tied_head": ("tie_word_embeddings",),
    "attention_scale": ("query_pre_attn_scalar", "attention_multiplier"),
    "attention_softcap": ("attn_logit_softcapping",),
    "logit_softcap": ("final_logit_softcapping",),
    "logit_scale": ("logits_scaling",),
    "residual_scale": ("residual_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "rms_norm_eps": ("rms_norm_eps",),
}
"""Fields of `ModelSpec`, and what they are called in config.json."""


class GgufModel(NamedTuple):
    """What a GGUF file of a model says, before its tokenizer and its tensors' numbers.

    Attributes:
        architecture: `general.architecture`.
        metadata: by full keys; whole numbers are uint32 in the file, others float32.
        tensors: by Hugging Face name.
        vectors: float32 tensors that are there beside them, by their names in the file.
    """

    architecture: str
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    vectors: dict[str, Tensor]


def gguf_model(config: Mapping[str, Any]) -> GgufModel:
    """What a GGUF file of a model says.

    Args:
        config: a parsed config.json.

    Returns:
        Its metadata and the places of its tensors.

    Raises:
        ModelError: the config is not one that lowtide reads, llama.cpp does not know the family,
            or cannot express a field, each of which is named.
    """
    spec = _without_idle_windows(spec_from_config(config))
    entry = entry_for(spec.model_type)
    tensors = tensors_of(spec, entry)
    homeless = [name for name, tensor in tensors.items() if not tensor.name]
    if homeless:
        raise ModelError(
            f"llama.cpp's architecture {entry.architecture!r} has no place for these tensors:\n"
            f"{listed(homeless)}\n{_field('tied_head', config)} in config.json asks for them; "
            "nothing was written."
        )
    if entry.square and spec.q_width != spec.hidden_size:
        raise _inexpressible(
            entry.architecture,
            [
                f"head_dim = {spec.head_dim}: {spec.num_heads} heads of it are {spec.q_width} "
                f"columns, and hidden_size = {spec.hidden_size} (expected the same)"
            ],
        )
    vectors = _rope_vectors(spec.ropes[0], spec.head_dim, entry)
    keys = {**_shared(spec), **_scaling(spec.ropes[0]), **entry.write(spec)}
    metadata = {f"{entry.architecture}.{name}": value for name, value in keys.items()}
    metadata = {"general.architecture": entry.architecture, **metadata}
    _refuse_what_is_lost(config, spec, GgufModel(entry.architecture, metadata, tensors, vectors))
    return GgufModel(entry.architecture, metadata, tensors, vectors)


def _without_idle_windows(spec: ModelSpec) -> ModelSpec:
    """A window as long as the longest sequence hides nothing."""
    layers = tuple(
        LayerSpec(0 if layer.window >= spec.max_positions else layer.window, layer.rope)
        for layer in spec.layers
    )
    return replace(spec, layers=layers)


def _shared(spec: ModelSpec) -> dict[str, Any]:
    """The keys that all families have."""
    return {
        "context_length": spec.max_positions,
        "embedding_length": spec.hidden_size,
        "block_count": spec.num_layers,
        "feed_forward_length": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": float(spec.rms_norm_eps),
        "rope.dimension_count": spec.ropes[0].rotated or spec.head_dim,
        "rope.freq_base": float(spec.ropes[0].theta),
    }


def _scaling(rope: RopeSpec) -> dict[str, Any]:
    """Keys of rotary angles that are rescaled."""
    if rope.kind in ("linear", "yarn"):
        keys = {"rope.scaling.type": rope.kind, "rope.scaling.factor": float(rope.factor)}
        if rope.kind == "yarn":
            keys["rope.scaling.original_context_length"] = rope.original_max_positions
        return keys
    if rope.depends_on_length:
        return {
            "rope.scaling.original_context_length": rope.original_max_positions,
            "rope.scaling.attn_factor": float(rope.table_factor),
        }
    return {}


def _rope_vectors(rope: RopeSpec, head_dim: int, entry: Gguf) -> dict[str, Tensor]:
    """Tensors of what each frequency is divided by, where the architecture reads them."""
    if rope.kind not in ("banded", "longrope"):
        return {}
    if rope.depends_on_length:
        names = {SHORT_FACTORS: rope.short_factors, LONG_FACTORS: rope.long_factors}
        vectors = {name: torch.tensor(factors) for name, factors in names.items()}
    else:
        plain = RopeSpec(rope.theta, rotated=rope.rotated)
        divided = inverse_frequencies(rope, head_dim).double()
        factors = inverse_frequencies(plain, head_dim).double() / divided
        vectors = {FREQUENCY_FACTORS: factors.float()}
    return {name: one for name, one in vectors.items() if name in entry.rope_tensors}


def _refuse_what_is_lost(config: Mapping[str, Any], spec: ModelSpec, model: GgufModel) -> None:
    """Read the metadata again, and compare."""
    shapes: dict[str, Sequence[int]] = {one.name: one.shape for one in model.tensors.values()}
    shapes |= {name: tuple(vector.shape) for name, vector in model.vectors.items()}
    again = spec_from_config(
        config_from_metadata(model.metadata, shapes, lambda name: model.vectors[name].tolist())
    )
    lost = [name for name in vars(spec) if not _same(name, spec, _without_idle_windows(again))]
    if lost:
        raise _inexpressible(model.architecture, [_field(name, config) for name in lost])


def _inexpressible(architecture: str, problems: Sequence[str]) -> ModelError:
    return ModelError(
        f"llama.cpp cannot express this model: its architecture {architecture!r} has no word for\n"
        f"{listed(problems)}\nNothing was written. If a field makes no difference to how you use "
        "the model (a window longer than your texts), set it to null in a copy of the directory."
    )


def _field(name: str, config: Mapping[str, Any]) -> str:
    """What config.json says of a field of `ModelSpec`."""
    fields = {**config, **(config.get("text_config") or {})}
    known = _FIELDS.get(name, (name,))
    said = [
        f"{one} = {'null' if fields[one] is None else shown(fields[one])}"
        for one in known
        if one in fields
    ]
    return ", ".join(said) or f"{' or '.join(known)} (not in config.json: its default)"


def _same(name: str, spec: ModelSpec, again: ModelSpec) -> bool:
    """Whether a field means the same in both."""
    if name in ("model_type", "noise_scale"):
        return True
    if name == "layers":
        return _what_layers_do(spec) == _what_layers_do(again)
    if name == "ropes":
        pairs = zip(_rope_of_layers(spec), _rope_of_layers(again), strict=True)
        return all(
            _same_angles(one, other, spec.head_dim)
            for one, other in set(pairs)
            if one is not None and other is not None  # else `layers` differ
        )
    ours, theirs = getattr(spec, name), getattr(again, name)
    if name == "attention_scale":
        usual = spec.head_dim**-0.5
        ours, theirs = ours or usual, theirs or usual
    if isinstance(ours, float):
        return bool(abs(ours - theirs) <= _TOLERANCE * abs(ours))
    return bool(ours == theirs)


def _what_layers_do(spec: ModelSpec) -> list[tuple[int, bool]]:
    """The window of each layer, and whether it rotates."""
    return [(layer.window, layer.rope is None) for layer in spec.layers]


def _rope_of_layers(spec: ModelSpec) -> list[RopeSpec | None]:
    return [None if layer.rope is None else spec.ropes[layer.rope] for layer in spec.layers]


def _same_angles(one: RopeSpec, other: RopeSpec, head_dim: int) -> bool:
    """Whether two tables hold the same angles, however they are described."""
    if (one.rotated or head_dim) != (other.rotated or head_dim):
        return False
    if one.depends_on_length != other.depends_on_length or (
        one.depends_on_length and one.original_max_positions != other.original_max_positions
    ):
        return False
    if abs(one.table_factor - other.table_factor) > _TOLERANCE * one.table_factor:
        return False
    return all(
        torch.allclose(
            inverse_frequencies(one, head_dim, long=long),
            inverse_frequencies(other, head_dim, long=long),
            rtol=_TOLERANCE,
            atol=0.0,
        )
        for long in (False, True)
    )
