"""From the metadata of a GGUF file to a config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowtide.errors import ModelError, shown
from lowtide.model.families import FAMILIES

from .entry import (
    FREQUENCY_FACTORS,
    LONG_FACTORS,
    SHORT_FACTORS,
    Gguf,
    MetadataReader,
    decimal,
    plain,
)

Vector = Callable[[str], Sequence[float]]
"""The numbers in a one-dimensional tensor of the file, by its name there."""
_EMBEDDING = "token_embd.weight"
_SPECIAL = ("bos", "eos")


def entry_of(architecture: Any) -> Gguf:
    """The family that reads files of an architecture.

    Args:
        architecture: the value of `general.architecture`.

    Returns:
        Its entry.

    Raises:
        ModelError: no family has it.
    """
    entries = {one.gguf.architecture: one.gguf for one in FAMILIES.values() if one.gguf is not None}
    if not isinstance(architecture, str) or architecture not in entries:
        said = (
            "the GGUF file does not say its architecture (general.architecture)"
            if architecture is None
            else f"the GGUF file's architecture is {shown(architecture)}"
        )
        raise ModelError(
            f"{said}; lowtide knows {', '.join(sorted(entries))}. Take a model of one of these, "
            "or see CONTRIBUTING.md, 'Add a family'."
        )
    return entries[architecture]


def config_from_metadata(
    metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], vector: Vector
) -> dict[str, Any]:
    """A config.json, as a dict, of the model in a GGUF file.

    Args:
        metadata: the file's keys and values; numbers, strings, booleans and sequences of them,
            numpy's kinds among them.
        shapes: of its tensors by their names in the file, rows first as in torch.
        vector: reads a tensor of one dimension; called for rotary factors only.

    Returns:
        What `spec_from_config` reads.

    Raises:
        ModelError: the architecture is not known; lists every key that is missing, of another
            type, or contradicts the tensors.
    """
    entry = entry_of(metadata.get("general.architecture"))
    kind = metadata.get("general.type")
    if kind is not None and not (isinstance(kind, str) and kind == "model"):
        raise ModelError(
            f"this GGUF file is of type {shown(kind)}, not a model. Give the "
            "file of the model itself."
        )
    reader = MetadataReader(metadata, entry.architecture, shapes)
    if any(name in reader.shapes for name in (f"blk.0.ffn_{part}_exps.weight" for part in _PARTS)):
        raise ModelError(
            "the GGUF file holds a mixture of experts (blk.0.ffn_up_exps.weight); lowtide trains "
            "models with one MLP per block."
        )
    config = _shared(reader, entry)
    config.update(_rotary(reader, entry, config["head_dim"], vector))
    config.update(entry.read(reader))
    reader.refuse_unread()
    reader.finish()
    return config


_PARTS = ("gate", "up", "down")


def _shared(reader: MetadataReader, entry: Gguf) -> dict[str, Any]:
    """The fields that all families have."""
    hidden, heads = reader.integer("embedding_length"), reader.integer("attention.head_count")
    head_dim = reader.integer("attention.key_length", max(1, hidden // heads))
    if reader.integer("attention.value_length", head_dim) != head_dim:
        reader.problems.append(
            f"{reader.key('attention.key_length')} = {head_dim} and "
            f"{reader.key('attention.value_length')} differ (expected the same number)"
        )
    config: dict[str, Any] = {
        "model_type": entry.model_type,
        "vocab_size": _vocab_size(reader, hidden),
        "hidden_size": hidden,
        "intermediate_size": reader.integer("feed_forward_length"),
        "num_hidden_layers": reader.layers(),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": reader.integer("context_length"),
        "rms_norm_eps": reader.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in reader.shapes and not entry.needs_head,
    }
    for flag, name in (("attention_bias", "attn_output"), ("mlp_bias", "ffn_down")):
        if flag in entry.biases:
            config[flag] = f"blk.0.{name}.bias" in reader.shapes
    for role in _SPECIAL:
        token = plain(reader.metadata.get(f"tokenizer.ggml.{role}_token_id"))
        if isinstance(token, int):  # else who reads the tokenizer complains
            config[f"{role}_token_id"] = token
    return config


def _vocab_size(reader: MetadataReader, hidden: int) -> int:
    """Rows of the embedding, which the vocabulary and the key must not contradict."""
    shape = tuple(reader.shapes.get(_EMBEDDING, ()))
    if len(shape) != 2:
        found = f"has shape {list(shape)}" if shape else "is missing"
        reader.problems.append(f"tensor {_EMBEDDING} {found} (expected a matrix)")
        return 1
    rows, columns = (int(size) for size in shape)
    if columns != hidden:
        reader.problems.append(
            f"tensor {_EMBEDDING} has {columns} columns and {reader.key('embedding_length')} says "
            f"{hidden}"
        )
    said = reader.integer("vocab_size", rows)
    if said != rows:
        reader.problems.append(
            f"tensor {_EMBEDDING} has {rows} rows and {reader.key('vocab_size')} says {said}"
        )
    tokens = reader.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list | tuple) and len(tokens) != rows:
        reader.problems.append(
            f"tensor {_EMBEDDING} has {rows} rows and tokenizer.ggml.tokens {len(tokens)} tokens"
        )
    return rows


def _rotary(reader: MetadataReader, entry: Gguf, head_dim: int, vector: Vector) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`."""
    fields: dict[str, Any] = {"rope_theta": reader.number("rope.freq_base", 10_000.0)}
    kind = reader.text("rope.scaling.type", "none")
    factor = reader.optional("rope.scaling.factor") or reader.optional("rope.scale_linear")
    found = [name for name in (FREQUENCY_FACTORS, SHORT_FACTORS) if name in reader.shapes]
    rotated = reader.integer("rope.dimension_count", head_dim)
    if rotated != head_dim:
        fields["partial_rotary_factor"] = rotated / head_dim
    original = reader.integer(
        "rope.scaling.original_context_length", reader.integer("context_length")
    )
    if found:
        fields["rope_scaling"] = _factors(reader, vector, original, rotated)
    elif kind == "yarn":
        fields["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": factor or 1.0,
            "original_max_position_embeddings": original,
        }
    elif kind in ("linear", "none"):
        if kind == "linear" and factor not in (0.0, 1.0):
            fields["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    else:
        reader.problems.append(
            f"{reader.key('rope.scaling.type')} = {kind!r} (expected none, linear or yarn, or "
            f"the tensor {SHORT_FACTORS})"
        )
    return fields


def _factors(reader: MetadataReader, vector: Vector, original: int, rotated: int) -> dict[str, Any]:
    """Frequencies that are divided by numbers in the file, one for each.

    One list for all lengths is written as two that are the same, which transformers reads too.
    """
    shared = FREQUENCY_FACTORS in reader.shapes
    names = [FREQUENCY_FACTORS] * 2 if shared else [SHORT_FACTORS, LONG_FACTORS]
    lists = []
    for name in names:
        shape = tuple(reader.shapes.get(name, ()))
        if shape != (rotated // 2,):
            found = f"has shape {list(shape)}" if shape else "is missing"
            reader.problems.append(f"tensor {name} {found} (expected [{rotated // 2}])")
            return {}
        lists.append([decimal(float(one)) for one in vector(name)])
    return {
        "rope_type": "longrope",
        "short_factor": lists[0],
        "long_factor": lists[1],
        "original_max_position_embeddings": original,
        "attention_factor": 1.0 if shared else reader.number("rope.scaling.attn_factor", 1.0),
    }
