"""What families share: the fields of a Llama-like decoder, windows, and tiny examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lowtide.model.gguf.entry import Gguf
from lowtide.model.spec import LayerSpec, ModelSpec, RopeSpec
from lowtide.weights.manifest import STORAGE_KEY

from .reader import ConfigReader

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_MOST_LAYERS = 10_000
GELU_TANH = ("gelu_pytorch_tanh", "gelu_tanh")


class Family(NamedTuple):
    """A model family.

    Attributes:
        spec: from a parsed config.json to a `ModelSpec`; raises `ModelError` for what differs.
        examples: configs of tiny models with odd shapes, between them with all that the family can
            do. The conformance tests hold each to transformers.
        gguf: what its GGUF files look like; None where llama.cpp does not know it.
    """

    spec: Callable[[Mapping[str, Any]], ModelSpec]
    examples: Sequence[Mapping[str, Any]]
    gguf: Gguf | None = None


class Sizes(NamedTuple):
    """The sizes that every config.json has."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int


def read_sizes(
    reader: ConfigReader,
    *,
    max_positions: int,
    head_dim: int | None = None,
    kv_heads: int | None = None,
) -> Sizes:
    """Sizes, and the settings that no family supports.

    Args:
        reader: the config.
        max_positions: what a missing `max_position_embeddings` means.
        head_dim: what a missing `head_dim` means; None divides the hidden size by the heads.
        kv_heads: what a missing `num_key_value_heads` means; None as many as there are heads, which
            null always means.

    Returns:
        The sizes; problems are recorded in the reader.

    Raises:
        ModelError: the number of layers is not sensible.
    """
    reader.refuse_set("attention_dropout", "use_bidirectional_attention")
    reader.refuse_unless(
        "quantization_config",
        lambda v: not v or (isinstance(v, Mapping) and STORAGE_KEY in v),
        "none but that of `lowtide quantize`; give unquantised weights",
    )
    vocab, hidden, inner, layers, heads = (reader.integer(name) for name in _REQUIRED)
    if layers > _MOST_LAYERS:
        reader.problems.append(f"num_hidden_layers = {layers} is not sensible")
        reader.finish()
    absent = kv_heads if "num_key_value_heads" not in reader.raw else None
    kv_heads = reader.integer("num_key_value_heads", absent or heads)
    if heads % kv_heads:
        reader.problems.append(
            f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        )
    if head_dim is None and reader.get("head_dim") is None and hidden % heads:
        reader.problems.append(
            f"hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}, and "
            "there is no head_dim"
        )
    dim = reader.integer("head_dim", head_dim or max(1, hidden // heads))
    positions = reader.integer("max_position_embeddings", max_positions)
    return Sizes(vocab, hidden, inner, layers, heads, kv_heads, dim, positions)


def one_rope(
    reader: ConfigReader, sizes: Sizes, theta: float = 10_000.0, *, partial: bool = False
) -> tuple[RopeSpec, ...]:
    """The rotary table of a model that has one.

    Args:
        reader: the config; problems are recorded.
        sizes: of the model.
        theta: what a missing `rope_theta` means.
        partial: whether the family may rotate a part of each head.

    Returns:
        One table.
    """
    found = reader.ropes()
    if not partial:
        found = rotates_all(reader, found)
    theta = reader.number("rope_theta", theta)
    return (reader.rope(sizes.max_positions, sizes.head_dim, theta, found),)


def rotates_all(reader: ConfigReader, found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Record a problem where only a part of each head is rotated.

    Args:
        reader: the config.
        found: rotary settings from it.

    Returns:
        The settings without the part.
    """
    if not isinstance(found, Mapping):  # refused where the table is read
        return found
    for settings in (found, reader.raw):
        value = settings.get("partial_rotary_factor")
        if value not in (None, 1):
            reader.problems.append(f"partial_rotary_factor = {value!r} (supported: 1)")
            return {**found, "partial_rotary_factor": 1}
    return found


def decoder_spec(
    reader: ConfigReader,
    sizes: Sizes,
    *,
    ropes: tuple[RopeSpec, ...],
    layers: Sequence[LayerSpec] | None = None,
    tied: bool = False,
    eps: float = 1e-6,
    **parts: Any,
) -> ModelSpec:
    """Put a spec together, and raise for all that was found wrong on the way.

    Args:
        reader: the config; fields that nobody has read by now are refused.
        sizes: from `read_sizes`.
        ropes: rotary tables.
        layers: what attention does in each block; None lets all see everything with table 0.
        tied: what a missing `tie_word_embeddings` means.
        eps: what a missing `rms_norm_eps` means.
        **parts: further fields of `ModelSpec`.

    Returns:
        The spec.

    Raises:
        ModelError: lists every field that is missing, malformed or not supported.
    """
    if not reader.has_read("layer_types"):
        reader.refuse_unless(
            "layer_types",
            lambda v: v is None or (isinstance(v, list) and all(k == "full_attention" for k in v)),
            "full_attention in every layer",
        )
    if "activation" not in parts:
        reader.refuse_unless("hidden_act", lambda v: v in ("silu", "swish"), "silu")
    spec = ModelSpec(
        model_type=str(reader.raw["model_type"]),
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        layers=tuple(layers or [LayerSpec()] * sizes.num_layers),
        ropes=ropes,
        rms_norm_eps=reader.number("rms_norm_eps", eps),
        max_positions=sizes.max_positions,
        tied_head=reader.flag("tie_word_embeddings", tied),
        **parts,
    )
    reader.finish()
    return spec


def switched_windows(
    reader: ConfigReader, sizes: Sizes, usual: Callable[[int], bool], default: int = 0
) -> list[LayerSpec]:
    """Layers where `use_sliding_window` turns windows on.

    Args:
        reader: the config; problems are recorded.
        sizes: of the model.
        usual: which layers slide where `layer_types` does not say.
        default: what a missing `sliding_window` means; 0 is none.

    Returns:
        What each layer does.
    """
    window = reader.window(default)
    if not reader.flag("use_sliding_window", False):
        window = 0
    slides = reader.sliding(sizes.num_layers, lambda layer: bool(window) and usual(layer))
    if any(slides) and not window:
        reader.problems.append(
            "layer_types has sliding_attention, and there is no window (use_sliding_window and "
            "sliding_window)"
        )
    return [LayerSpec(window if slides[layer] else 0) for layer in range(sizes.num_layers)]


def biased(reader: ConfigReader, field: str, *names: str) -> list[str]:
    """The names of projections that carry a bias where the field says so."""
    return list(names) if reader.flag(field, False) else []


def tiny(**changes: Any) -> dict[str, Any]:
    """A tiny config with odd sizes: nothing divides anything that need not."""
    return {
        "vocab_size": 131,
        "hidden_size": 45,
        "intermediate_size": 74,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }
