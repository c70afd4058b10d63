"""Reading config.json: every field is used, known to be harmless, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from lowtide.errors import ModelError, listed, shown
from lowtide.model.spec import RopeSpec

# Fields that say nothing about the function, or only about training from scratch or decoding.
HARMLESS = frozenset(
    """
    _name_or_path architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens
    bos_token_id cache_implementation chunk_size_feed_forward decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range label2id
    length_penalty max_length max_window_layers min_length model_type no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores pad_token_id prefix pretraining_tp problem_type remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)
# Settings of long contexts, under the names of config.json, and what must be there of each.
_ROPE_KINDS = {
    "default": ("default", ()),
    # It changes the base of sequences beyond max_position_embeddings, and those are refused.
    "dynamic": ("default", ("factor",)),
    "linear": ("linear", ("factor",)),
    "llama3": ("banded", ("factor", "low_freq_factor", "high_freq_factor")),
    "yarn": ("yarn", ("factor",)),
    "longrope": ("longrope", ("short_factor", "long_factor")),
    "su": ("longrope", ("short_factor", "long_factor")),
}
_ROPE_OPTIONAL = {
    "banded": {"original_max_position_embeddings"},
    "longrope": {"original_max_position_embeddings", "factor", "attention_factor"},
    "yarn": {
        *("original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim"),
        *("beta_fast", "beta_slow", "truncate"),
    },
}
Check = Callable[[Any], bool]


class ConfigReader:
    """Reads fields of one config.json and collects every problem before raising once.

    What is read is known; `finish` refuses the rest.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Wrap a parsed config.json."""
        self.raw = raw
        self.problems: list[str] = []
        self._known: set[str] = set(HARMLESS)

    def get(self, name: str, default: Any = None) -> Any:
        """A field as it is; None counts as missing."""
        self._known.add(name)
        value = self.raw.get(name)
        return default if value is None else value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite positive number; a missing one without default is a problem."""
        value = self.get(name, default)
        if value is None:
            self.problems.append(f"{name} is missing")
            return 1.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e18:
            self.problems.append(f"{name} = {shown(value)} (expected a positive number)")
            return 1.0
        return float(value)

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer; a missing one without default is a problem."""
        value = self.number(name, default)
        if value != int(value):
            self.problems.append(f"{name} = {shown(value)} (expected an integer)")
        return max(1, int(value))

    def optional(self, name: str, default: float = 0.0) -> float:
        """A positive number; null is 0, and a field that is not there the default."""
        if name in self.raw and self.raw[name] is None:
            self._known.add(name)
            return 0.0
        return self.number(name, default) if name in self.raw or default else 0.0

    def window(self, default: int = 0) -> int:
        """`sliding_window` in keys; null is 0, which is none, and a missing field the default."""
        value = self.optional("sliding_window", default)
        if value != int(value):
            self.problems.append(f"sliding_window = {shown(value)} (expected an integer)")
        return int(value)

    def count(self, name: str, default: int) -> int:
        """A whole number from 0."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.problems.append(f"{name} = {shown(value)} (expected an integer from 0)")
            return default
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.problems.append(f"{name} = {shown(value)} (expected true or false)")
            return default
        return value

    def flags(self, name: str, count: int) -> list[bool] | None:
        """A list of `count` zeros and ones, or None where there is none."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, list) and len(value) == count and all(one in (0, 1) for one in value):
            return [bool(one) for one in value]
        self.problems.append(f"{name} = {shown(value)} (expected {count} of 0 and 1)")
        return None

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` positive numbers."""
        value = self.get(name)
        good = isinstance(value, list) and all(
            isinstance(one, int | float) and 0 < one < 1e18 for one in value
        )
        if value is not None and good and len(value) == count:
            return tuple(float(one) for one in value)
        found = f"{len(value)} of them" if good else shown(value)
        self.problems.append(f"{name}: {found} (expected {count} positive numbers)")
        return ()

    def refuse_unless(self, name: str, supported: Check, expected: str) -> None:
        """Record a problem when the field is there and its value is not supported."""
        self._known.add(name)
        if name in self.raw and not supported(self.raw[name]):
            self.problems.append(f"{name} = {shown(self.raw[name])} (supported: {expected})")

    def refuse_set(self, *names: str) -> None:
        """Record a problem for each of these that is set to anything but null, false or zero."""
        for name in names:
            self.refuse_unless(name, lambda value: not value, "none")

    def sliding(self, count: int, usual: Callable[[int], bool]) -> list[bool]:
        """Which layers attend in a window: from `layer_types`, or by the family's rule."""
        kinds = self.get("layer_types")
        if kinds is None:
            return [usual(layer) for layer in range(count)]
        names = {"full_attention": False, "sliding_attention": True}
        known = isinstance(kinds, list) and all(
            isinstance(kind, str) and kind in names for kind in kinds
        )
        if not known or len(kinds) != count:
            self.problems.append(
                f"layer_types = {shown(kinds)} (expected one of {', '.join(names)} for each of "
                f"{count} layers)"
            )
            return [False] * count
        return [names[kind] for kind in kinds]

    def ropes(self) -> Mapping[str, Any]:
        """Rotary settings of either spelling: `rope_parameters`, or `rope_scaling`."""
        names = ("rope_parameters", "rope_scaling")
        for name in names:
            value = self.get(name, {})
            if not isinstance(value, Mapping):
                self.problems.append(f"{name} = {shown(value)} (expected an object)")
        found = [
            value for name in names if (value := self.get(name)) and isinstance(value, Mapping)
        ]
        if len(found) > 1 and found[0] != found[1]:
            self.problems.append(
                "rope_parameters and rope_scaling are both there and differ (expected one of them)"
            )
        return dict(found[0]) if found else {}

    def rope(
        self, max_positions: int, head_dim: int, theta: float, settings: Mapping[str, Any]
    ) -> RopeSpec:
        """One table of rotary angles.

        Args:
            max_positions: of the model.
            head_dim: columns of a head.
            theta: the base where `settings` do not say.
            settings: from `ropes`, or one of the objects in it.

        Returns:
            The table's settings; problems are recorded.
        """
        if not isinstance(settings, Mapping):
            self.problems.append(f"rotary settings are {shown(settings)} (expected an object)")
            settings = {}
        inner = ConfigReader({name: v for name, v in settings.items() if v is not None})
        name = inner.get("rope_type") or inner.get("type") or "default"
        inner.get("type")
        if not isinstance(name, str) or name not in _ROPE_KINDS:
            self.problems.append(f"rope type {shown(name)} (supported: {', '.join(_ROPE_KINDS)})")
            return RopeSpec(theta)
        kind, needed = _ROPE_KINDS[name]
        fields = set(needed) | _ROPE_OPTIONAL.get(kind, set())
        fields |= {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
        for field, value in inner.raw.items():
            if field not in fields:
                self.problems.append(
                    f"rope field {field} = {shown(value)} is not one of type {name!r}"
                )
        share = inner.number("partial_rotary_factor", self.number("partial_rotary_factor", 1.0))
        rotated = int(head_dim * share)
        if rotated % 2 or not 0 < rotated <= head_dim:
            self.problems.append(
                f"head_dim = {head_dim} is odd; rotary embeddings need pairs"
                if share == 1.0
                else f"partial_rotary_factor = {share:g} of head_dim = {head_dim} is {rotated} "
                "columns (expected an even number, at most all)"
            )
        spec = RopeSpec(
            theta=inner.number("rope_theta", theta),
            kind=kind,
            rotated=0 if rotated == head_dim else rotated,
        )
        spec = replace(spec, **_scaling(self, inner, spec, max_positions, rotated))
        self.problems += inner.problems
        return spec

    def finish(self) -> None:
        """Raise once with everything that was found, fields that nobody has read among it.

        Raises:
            ModelError: at least one problem was recorded.
        """
        for name, value in self.raw.items():
            neutral = value is None or value is False or value == [] or value == {}
            if name not in self._known and not name.startswith("_") and not neutral:
                self.problems.append(f"{name} = {shown(value)} is not a field that lowtide knows")
        if self.problems:
            raise ModelError(
                f"config.json (model_type {self.raw.get('model_type')!r}) asks for what lowtide "
                f"does not support or cannot read:\n{listed(self.problems)}\nlowtide never ignores "
                "a setting that may change the model's function. If a field has no effect on this "
                "model, remove it from a copy of config.json."
            )

    def know(self, names: Iterable[str]) -> None:
        """Fields that the family has looked at itself."""
        self._known.update(names)

    def has_read(self, name: str) -> bool:
        """Whether somebody has looked at the field."""
        return name in self._known


def _scaling(
    outer: ConfigReader, inner: ConfigReader, rope: RopeSpec, max_positions: int, rotated: int
) -> dict[str, Any]:
    """The fields of `RopeSpec` that rescale frequencies."""
    if rope.kind == "default":
        return {}
    if rope.kind == "linear":
        return {"factor": inner.number("factor")}
    original = inner.integer("original_max_position_embeddings", max_positions)
    if rope.kind == "banded":
        return {
            "factor": inner.number("factor"),
            "low_freq_factor": inner.number("low_freq_factor"),
            "high_freq_factor": inner.number("high_freq_factor"),
            "original_max_positions": original,
        }
    if rope.kind == "yarn":
        return _yarn(inner, rope.theta, original, rotated)
    # Where both are there, the one outside decides.
    original = outer.integer("original_max_position_embeddings", original)
    factor = inner.number("factor", max_positions / original)
    usual = 1.0
    if factor > 1.0 and original > 1:
        usual = math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "original_max_positions": original,
        "short_factors": inner.numbers("short_factor", rotated // 2),
        "long_factors": inner.numbers("long_factor", rotated // 2),
        "table_factor": inner.number("attention_factor", usual),
    }


def _yarn(inner: ConfigReader, theta: float, original: int, rotated: int) -> dict[str, Any]:
    """YaRN (arXiv 2309.00071): where its ramp begins and ends, and the factor on its tables."""
    factor = inner.number("factor")
    ends = []
    for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        turns = inner.number(name, usual)
        if theta == 1.0:
            inner.problems.append("rope_theta = 1 (expected more, with rope type 'yarn')")
            return {}
        ends.append(rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)))
    if inner.flag("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    scales = [inner.optional(name) for name in ("mscale", "mscale_all_dim")]
    above, below = scales if all(scales) else (1.0, 0.0)
    log = 0.1 * math.log(factor) if factor > 1 else 0.0
    return {
        "factor": factor,
        "original_max_positions": original,
        "ramp": (float(max(ends[0], 0)), float(min(ends[1], rotated - 1))),
        "table_factor": inner.number("attention_factor", (above * log + 1) / (below * log + 1)),
    }
