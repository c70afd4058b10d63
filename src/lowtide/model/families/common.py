"""Reading config.json: every field is used, known to be harmless, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lowtide.errors import ModelError, listed
from lowtide.model.spec import LINEARS, ModelSpec, RopeSpec
from lowtide.weights.manifest import STORAGE_KEY

# Fields that say nothing about the function, or only about training from scratch or decoding.
HARMLESS = frozenset(
    """
    _name_or_path architectures auto_map attn_implementation bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label initializer_range label2id length_penalty max_length
    max_window_layers min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
    unsloth_fixed unsloth_version use_cache use_bfloat16
    """.split()
)
USED = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim rms_norm_eps max_position_embeddings tie_word_embeddings
    rope_theta rope_scaling rope_parameters hidden_act
    """.split()
)
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_MOST_LAYERS = 10_000
_ROPE_FIELDS = {
    "default": frozenset({"rope_theta"}),
    "linear": frozenset({"rope_theta", "factor"}),
    "llama3": frozenset(
        {
            "rope_theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        }
    ),
}
Check = Callable[[Any], bool]


class ConfigReader:
    """Reads fields of one config.json and collects every problem before raising once."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Wrap a parsed config.json."""
        self.raw = raw
        self.problems: list[str] = []

    def number(self, name: str, default: float | None = None) -> float:
        """A finite positive number; a missing one without default is a problem."""
        value = self.raw.get(name)
        value = default if value is None else value
        if value is None:
            self.problems.append(f"{name} is missing")
            return 1.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e18:
            self.problems.append(f"{name} = {value!r} (expected a positive number)")
            return 1.0
        return float(value)

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer; a missing one without default is a problem."""
        value = self.number(name, default)
        if value != int(value):
            self.problems.append(f"{name} = {value!r} (expected an integer)")
        return max(1, int(value))

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problems.append(f"{name} = {value!r} (expected true or false)")
            return default
        return value

    def refuse_unless(self, name: str, supported: Check, expected: str) -> None:
        """Record a problem when the field is there and its value is not supported."""
        if name in self.raw and not supported(self.raw[name]):
            self.problems.append(f"{name} = {self.raw[name]!r} (supported: {expected})")

    def refuse_unknown(self, known: Iterable[str]) -> None:
        """Record fields that nobody reads and that are set to something."""
        known = set(known) | USED | HARMLESS
        for name, value in self.raw.items():
            neutral = value is None or value is False or value == [] or value == {}
            if name not in known and not name.startswith("_") and not neutral:
                self.problems.append(f"{name} = {value!r} is not a field that lowtide knows")

    def rope(self, max_positions: int, default_theta: float) -> RopeSpec:
        """Both spellings: `rope_theta` with `rope_scaling`, and `rope_parameters`."""
        nested = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        if not isinstance(nested, Mapping):
            self.problems.append(f"rope_scaling = {nested!r} (expected an object)")
            nested = {}
        kind = nested.get("rope_type") or nested.get("type") or "default"
        if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
            self.problems.append(
                f"rope type {kind!r} (supported: {', '.join(sorted(_ROPE_FIELDS))})"
            )
            return RopeSpec(default_theta)
        inner = ConfigReader(nested)
        for name, value in nested.items():
            if name not in _ROPE_FIELDS[kind] | {"rope_type", "type"} and value is not None:
                self.problems.append(f"rope field {name} = {value!r} is not one of type {kind!r}")
        theta = nested.get("rope_theta")
        spec = RopeSpec(
            theta=inner.number("rope_theta") if theta else self.number("rope_theta", default_theta),
            kind=kind,
            factor=inner.number("factor") if kind != "default" else 1.0,
        )
        if kind == "llama3":
            spec = RopeSpec(
                theta=spec.theta,
                kind=kind,
                factor=spec.factor,
                low_freq_factor=inner.number("low_freq_factor"),
                high_freq_factor=inner.number("high_freq_factor"),
                original_max_positions=inner.integer(
                    "original_max_position_embeddings", max_positions
                ),
            )
        self.problems += inner.problems
        return spec

    def finish(self) -> None:
        """Raise once with everything that was found.

        Raises:
            ModelError: at least one problem was recorded.
        """
        if self.problems:
            raise ModelError(
                f"config.json (model_type {self.raw.get('model_type')!r}) asks for what lowtide "
                f"does not support or cannot read:\n{listed(self.problems)}\nlowtide never ignores "
                "a setting that may change the model's function. If a field has no effect on this "
                "model, remove it from a copy of config.json."
            )


def decoder_spec(
    reader: ConfigReader, *, biased: Iterable[str], default_positions: int, known: Iterable[str]
) -> ModelSpec:
    """The fields that all Llama-like decoders share.

    Args:
        reader: the config; its problems are raised here.
        biased: which of LINEARS carry a bias.
        default_positions: what a missing `max_position_embeddings` means.
        known: further fields that the family has looked at.

    Returns:
        The spec.

    Raises:
        ModelError: lists every field that is missing, malformed or not supported.
    """
    reader.refuse_unless("hidden_act", lambda v: v in ("silu", "swish"), "silu")
    reader.refuse_unless("attention_dropout", lambda v: not v, "0")
    reader.refuse_unless("partial_rotary_factor", lambda v: v in (None, 1, 1.0), "1")
    reader.refuse_unless(
        "quantization_config",
        lambda v: not v or (isinstance(v, Mapping) and STORAGE_KEY in v),
        "none but that of `lowtide quantize`; give unquantised weights",
    )
    reader.refuse_unless("sliding_window_pattern", lambda v: v is None, "none")
    reader.refuse_unless(
        "layer_types",
        lambda v: v is None or (isinstance(v, list) and all(one == "full_attention" for one in v)),
        "full_attention in every layer",
    )
    looked_at = ("attention_dropout", "partial_rotary_factor", "quantization_config", "layer_types")
    reader.refuse_unknown({*looked_at, *known})
    sizes = {name: reader.integer(name) for name in _REQUIRED}
    if sizes["num_hidden_layers"] > _MOST_LAYERS:
        reader.problems.append(f"num_hidden_layers = {sizes['num_hidden_layers']} is not sensible")
        reader.finish()
    heads = sizes["num_attention_heads"]
    kv_heads = reader.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        reader.problems.append(
            f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        )
    if reader.raw.get("head_dim") is None and sizes["hidden_size"] % heads:
        reader.problems.append(
            f"hidden_size = {sizes['hidden_size']} is not a multiple of num_attention_heads = "
            f"{heads}, and there is no head_dim"
        )
    head_dim = reader.integer("head_dim", max(1, sizes["hidden_size"] // heads))
    if head_dim % 2:
        reader.problems.append(f"head_dim = {head_dim} is odd; rotary embeddings need pairs")
    max_positions = reader.integer("max_position_embeddings", default_positions)
    spec = ModelSpec(
        model_type=str(reader.raw["model_type"]),
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=reader.rope(max_positions, default_theta=10_000.0),
        max_positions=max_positions,
        tied_head=reader.flag("tie_word_embeddings", False),
        biased=frozenset(biased),
    )
    assert spec.biased <= set(LINEARS)
    reader.finish()
    return spec
