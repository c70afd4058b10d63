"""The settings of an adapter, declared once, and what they come to on a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from lowtide.config import flag, setting
from lowtide.errors import ConfigError
from lowtide.model.adapter import ALL_LINEAR, LoraConfig
from lowtide.model.spec import ModelSpec

_PAIR = re.compile(r"\s*(.+?)\s*=\s*([^=,]+?)\s*(?:,|$)")
_SPAN = re.compile(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*")
V = TypeVar("V", int, float)


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The adapter's shape."""

    lora_r: int = setting(8, help="LoRA rank", minimum=1, maximum=8192)
    lora_alpha: float = setting(16.0, help="LoRA output is scaled by alpha / r", above=0)
    lora_dropout: float = setting(
        0.0, help="probability of dropping an adapter's input in training", minimum=0, maximum=0.99
    )
    use_rslora: bool = setting(False, help="rsLoRA: scale LoRA output by alpha / sqrt(r) instead")
    use_dora: bool = setting(
        False, help="DoRA: learn the length of each row of the adapted weights beside LoRA"
    )
    target_modules: str = setting(
        ALL_LINEAR,
        help="'all-linear', or names separated by commas such as q_proj,v_proj",
        listed=True,
    )
    rank_pattern: str | None = setting(
        None,
        help="other ranks for some linears, such as q_proj=16,mlp.down_proj=4: the end of a "
        "module's name or a regular expression of it, the first that matches counts (YAML: a "
        "mapping)",
        mapped=True,
    )
    alpha_pattern: str | None = setting(
        None, help="other alphas for some linears, likewise", mapped=True
    )
    num_layers: int | None = setting(
        None, help="adapt the last N blocks only; none adapts all", minimum=1
    )
    layers_to_transform: str | None = setting(
        None, help="adapt these blocks only, counted from 0, such as 0,4,8-11", listed=True
    )

    def lora_config(self, spec: ModelSpec) -> LoraConfig:
        """As the adapter wants it.

        Args:
            spec: the model.

        Returns:
            Settings that fit the model.

        Raises:
            ConfigError: a pattern or a list of layers cannot be read, comes to nothing on this
                model, or layers are given twice.
        """
        config = LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
            layers_to_transform=self._layers(spec),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            rank_pattern=_pattern("rank_pattern", self.rank_pattern, int),
            alpha_pattern=_pattern("alpha_pattern", self.alpha_pattern, float),
        )
        config.check_patterns(spec)
        return config

    def _layers(self, spec: ModelSpec) -> tuple[int, ...] | None:
        if self.num_layers is not None and self.layers_to_transform is not None:
            raise ConfigError("give --num-layers or --layers-to-transform, not both.")
        if self.num_layers is not None:
            if self.num_layers > spec.num_layers:
                raise ConfigError(
                    f"--num-layers is {self.num_layers}, and the model has {spec.num_layers} "
                    "blocks. Leave it out to adapt all of them."
                )
            return tuple(range(spec.num_layers - self.num_layers, spec.num_layers))
        text = self.layers_to_transform
        if text is None:
            return None
        chosen: set[int] = set()
        for part in text.split(","):
            match = _SPAN.fullmatch(part)
            first, last = (0, -1) if match is None else (int(match[1]), int(match[2] or match[1]))
            if last < first:
                raise ConfigError(
                    f"layers_to_transform = {text!r}: expected numbers of blocks counted from 0, "
                    f"such as 0,4,8-11, and found {part.strip()!r}."
                )
            if last >= spec.num_layers:
                raise ConfigError(
                    f"layers_to_transform = {text!r}: the model has layers 0 to "
                    f"{spec.num_layers - 1}."
                )
            chosen.update(range(first, last + 1))
        return tuple(sorted(chosen))


def _pattern(name: str, text: str | None, kind: Callable[[str], V]) -> dict[str, V]:
    """Values by key from `key=value,key=value`; a key may have commas of its own."""
    if text is None:
        return {}
    found: dict[str, V] = {}
    place = 0
    while place < len(text):
        match = _PAIR.match(text, place)
        try:
            if match is None:
                raise ValueError
            if match[1] in found:
                raise ConfigError(f"{name} = {text!r} gives {match[1]!r} twice.")
            found[match[1]] = kind(match[2])
        except ValueError as error:
            kinds = "a whole number" if kind is int else "a number"
            raise ConfigError(
                f"{name} = {text!r}: expected pairs such as q_proj=16,down_proj=4, each with "
                f"{kinds}. Give them with {flag(name)} KEY=VALUE,KEY=VALUE or as a YAML mapping."
            ) from error
        place = match.end()
    return found
