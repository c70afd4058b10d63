"""What an adapter is: PEFT's settings, and which modules of a model they come to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lowtide.errors import ConfigError, shown

from .patterns import MOST_CHARACTERS, expression, first_match, match_all
from .spec import ModelSpec

ALL_LINEAR = "all-linear"
_MOST_ALPHA = 1e9
"""Beyond it, nothing but a mistake; far beyond, no float32."""


@dataclass(frozen=True)
class LoraConfig:
    """Settings of an adapter, under PEFT's names.

    Attributes:
        r: rank.
        lora_alpha: the adapter's output is scaled by `lora_alpha / r`.
        lora_dropout: probability of dropping an element of the adapter's input in training.
        target_modules: `all-linear`, or module names such as `q_proj` or `self_attn.q_proj`.
        layers_to_transform: blocks to adapt, counted from 0; None adapts all.
        use_rslora: scale by `lora_alpha / sqrt(r)` instead (arXiv 2312.03732).
        use_dora: learn the length of each row of the adapted weight too (arXiv 2402.09353).
        rank_pattern: other ranks by module name or regular expression, as PEFT matches them: the
            end of `model.layers.0.self_attn.q_proj`, from a dot on; the first that matches counts.
        alpha_pattern: other alphas, likewise.
    """

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    layers_to_transform: Sequence[int] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse values that no adapter can have.

        Raises:
            ConfigError: names the value and the range.
        """
        _check_rank("lora r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        dropout = self.lora_dropout
        if not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
            raise ConfigError(f"lora_dropout is {dropout!r}; expected 0 <= lora_dropout < 1.")
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected true or false.")
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
            pattern = getattr(self, name)
            if not isinstance(pattern, Mapping):
                raise ConfigError(f"{name} is {pattern!r}; expected values by module name.")
            for key, value in pattern.items():
                _check_key(name, key)
                check(f"{name}[{key!r}]", value)

    def rank(self, layer: int, linear: str) -> int:
        """The rank on a linear, by its block and its name in the block."""
        key = first_match(tuple(self.rank_pattern), _path(layer, linear))
        return self.r if key is None else self.rank_pattern[key]

    def scale(self, layer: int, linear: str) -> float:
        """What the adapter's output on a linear is multiplied by."""
        key = first_match(tuple(self.alpha_pattern), _path(layer, linear))
        alpha = self.lora_alpha if key is None else self.alpha_pattern[key]
        rank = self.rank(layer, linear)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def linears(self, spec: ModelSpec) -> tuple[str, ...]:
        """The targeted projections, in block order.

        Args:
            spec: the model, whose module names these are.

        Returns:
            At least one name.

        Raises:
            ConfigError: a name matches no linear, or there are none.
        """
        names = self.target_modules
        if isinstance(names, str):
            names = [part.strip() for part in names.split(",") if part.strip()]
        if list(names) == [ALL_LINEAR]:
            return spec.linears
        known = {linear.split(".")[-1]: linear for linear in spec.linears}
        known |= {linear: linear for linear in spec.linears}
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            reason = "the output head is frozen in this method" if "lm_head" in unknown else ""
            raise ConfigError(
                f"target_modules {', '.join(map(repr, unknown)) or 'is empty'}: not a linear of "
                f"this model{' (' + reason + ')' if reason else ''}. Choose {ALL_LINEAR!r} or "
                f"names among {', '.join(linear.split('.')[-1] for linear in spec.linears)}."
            )
        chosen = {known[name] for name in names}
        return tuple(linear for linear in spec.linears if linear in chosen)

    def layers(self, spec: ModelSpec) -> tuple[int, ...]:
        """The adapted blocks, in order.

        Args:
            spec: the model.

        Returns:
            At least one.

        Raises:
            ConfigError: a block is not in the model, or there are none.
        """
        layers = self.layers_to_transform
        outside = [layer for layer in layers or () if not 0 <= layer < spec.num_layers]
        if outside or (layers is not None and not layers):
            raise ConfigError(
                f"layers_to_transform is {list(layers or ())}; the model has layers 0 to "
                f"{spec.num_layers - 1}."
            )
        return tuple(range(spec.num_layers) if layers is None else sorted(set(layers)))

    def adapted(self, spec: ModelSpec) -> Iterator[tuple[int, str, int]]:
        """Block, linear and rank of every adapted linear, in order.

        Args:
            spec: the model.

        Yields:
            As in the first line.

        Raises:
            ConfigError: a pattern takes too long to match.
        """
        linears = self.linears(spec)
        paths = [_path(layer, linear) for layer in self.layers(spec) for linear in linears]
        for pattern in (self.rank_pattern, self.alpha_pattern):
            match_all(tuple(pattern), paths)
        for layer in self.layers(spec):
            for linear in linears:
                yield layer, linear, self.rank(layer, linear)

    def trained_layers(self, spec: ModelSpec) -> range:
        """Blocks that a gradient passes through: from the lowest adapted one up."""
        return range(self.layers(spec)[0], spec.num_layers)

    def check_patterns(self, spec: ModelSpec) -> None:
        """Refuse a pattern that no adapted linear matches: it would be ignored.

        Args:
            spec: the model.

        Raises:
            ConfigError: names the patterns.
        """
        paths = [_path(layer, linear) for layer, linear, _ in self.adapted(spec)]
        for name in ("rank_pattern", "alpha_pattern"):
            keys = tuple(getattr(self, name))
            used = {first_match(keys, path) for path in paths}
            unused = [key for key in keys if key not in used]
            if unused:
                raise ConfigError(
                    f"{name} {', '.join(map(repr, unused))}: matches no adapted linear that an "
                    "earlier pattern does not, and would be ignored. A pattern is the end of a "
                    f"name such as {paths[0]!r}, from a dot on, or a regular expression of it."
                )

    def in_words(self) -> str:
        """Kind, rank and what differs from the usual, for people."""
        parts = [f"{'DoRA' if self.use_dora else 'LoRA'} r={self.r}"]
        if self.use_rslora:
            parts.append("scaled by alpha / sqrt(r)")
        for name, pattern in (("r", self.rank_pattern), ("alpha", self.alpha_pattern)):
            if pattern:
                parts.append(
                    ", ".join(f"{name}={value} on {key}" for key, value in pattern.items())
                )
        return ", ".join(parts)


def _path(layer: int, linear: str) -> str:
    """PEFT's name of a linear in the base model."""
    return f"model.layers.{layer}.{linear}"


def _check_rank(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1.")


def _check_alpha(name: str, value: object) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
    if not 0 < number <= _MOST_ALPHA:
        raise ConfigError(
            f"{name} is {shown(value)}; expected a positive number, at most {_MOST_ALPHA:g}."
        )


def _check_key(name: str, key: object) -> None:
    """A key is the end of a module's name, or a regular expression of it."""
    try:
        if not isinstance(key, str) or not key:
            raise re.error("it is empty or no text")
        if len(key) > MOST_CHARACTERS:
            raise re.error(f"it has {len(key):,} characters, more than {MOST_CHARACTERS}")
        re.compile(expression(key))
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{name} has the key {shown(key)}; expected the end of a module's name, such as "
            f"'q_proj', or a regular expression of it ({error})."
        ) from error
