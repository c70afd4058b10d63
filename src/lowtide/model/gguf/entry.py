"""What a family says of itself to GGUF, and how it reads its fields.

Names of keys are those of the `gguf` package, without the architecture in front:
`attention.scale` is the file's `granite.attention.scale`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lowtide.errors import ModelError, listed, shown
from lowtide.model.spec import ModelSpec

MOST_LAYERS = 10_000
FREQUENCY_FACTORS = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
# Tensors that no product reads: what each frequency of the rotary angles is divided by.
ROPE_TENSORS = (FREQUENCY_FACTORS, SHORT_FACTORS, LONG_FACTORS)

CHANGE_THE_FUNCTION: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0,),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_beta_fast": (32,),
    "rope.scaling.yarn_beta_slow": (1,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}
"""Keys of some architectures, and the values with which they change nothing."""


class Gguf(NamedTuple):
    """A family in GGUF files, as llama.cpp understands them.

    Attributes:
        architecture: `general.architecture`.
        model_type: of the config.json that a file of that architecture becomes.
        read: fields of config.json beyond those that all families have.
        write: keys, without the architecture, beyond those that all families have.
        pairs: whether rows of q and k are stored in the order in which neighbours are rotated
            together, and not one half of a head with the other.
        biases: flags of config.json that put biases on projections, as far as llama.cpp adds them.
        rope_tensors: of FREQUENCY_FACTORS, SHORT_FACTORS and LONG_FACTORS, those that llama.cpp
            reads.
        square: whether q must be as wide as the residual stream.
        needs_head: whether a head that is the embedding is not known.
    """

    architecture: str
    model_type: str
    read: Callable[[MetadataReader], dict[str, Any]] = lambda reader: {}
    write: Callable[[ModelSpec], dict[str, Any]] = lambda spec: {}
    pairs: bool = False
    biases: tuple[str, ...] = ()
    rope_tensors: tuple[str, ...] = ()
    square: bool = False
    needs_head: bool = False


class MetadataReader:
    """Reads keys of one file's metadata and collects every problem before raising once.

    Args:
        metadata: values by their full keys.
        architecture: whose keys are read.
        shapes: of the file's tensors by name, rows first.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        architecture: str,
        shapes: Mapping[str, Sequence[int]],
    ) -> None:
        self.metadata = metadata
        self.architecture = architecture
        self.shapes = shapes
        self.problems: list[str] = []
        self._read: set[str] = set()

    def key(self, name: str) -> str:
        """The full key."""
        return f"{self.architecture}.{name}"

    def value(self, name: str, default: Any = None) -> Any:
        """What the file says, numbers as Python's own."""
        self._read.add(name)
        return plain(self.metadata.get(self.key(name), default))

    def has(self, name: str) -> bool:
        """Whether the file says it."""
        return self.key(name) in self.metadata

    def number(self, name: str, default: float | None = None, *, least: float = 0.0) -> float:
        """A number above `least`; a missing one without default is a problem."""
        value = self.value(name)
        if value is None and default is not None:
            return default
        if value is None:
            self.problems.append(f"{self.key(name)} is missing")
            return 1.0
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.problems.append(f"{self.key(name)} = {shown(value)} (expected a number)")
            return 1.0
        if not least < value < 1e18:
            self.problems.append(
                f"{self.key(name)} = {shown(value)} (expected a number above {least:g})"
            )
            return 1.0
        return decimal(value) if isinstance(value, float) else float(value)

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number from 1; a missing one without default is a problem."""
        value = self.number(name, default)
        if value != int(value):
            self.problems.append(f"{self.key(name)} = {value:g} (expected a whole number)")
        return max(1, int(value))

    def layers(self) -> int:
        """How many blocks there are; of more than anybody has made, one is assumed."""
        count = self.integer("block_count")
        if count <= MOST_LAYERS:
            return count
        self.problems.append(f"{self.key('block_count')} = {count} is not sensible")
        return 1

    def optional(self, name: str) -> float:
        """A number above 0, or 0 where the file does not say it or says 0."""
        value = self.value(name)
        zero = isinstance(value, int | float) and value == 0
        return 0.0 if value is None or zero else self.number(name)

    def text(self, name: str, default: str) -> str:
        """A string."""
        value = self.value(name, default)
        if isinstance(value, str):
            return value
        self.problems.append(f"{self.key(name)} = {shown(value)} (expected a string)")
        return default

    def refuse_unread(self) -> None:
        """Record keys that change the function of some families and that nobody has read."""
        for name, neutral in CHANGE_THE_FUNCTION.items():
            if name in self._read or not self.has(name):
                continue
            value = self.value(name)
            if not (isinstance(value, int | float) and value in neutral):
                self.problems.append(
                    f"{self.key(name)} = {shown(value)} is not a setting that lowtide knows in "
                    "this architecture"
                )

    def finish(self) -> None:
        """Raise once with everything that was found.

        Raises:
            ModelError: at least one problem was recorded.
        """
        if self.problems:
            raise ModelError(
                "the GGUF file's metadata lacks what lowtide needs, or says what it cannot read:\n"
                f"{listed(self.problems)}\nDownload the file again, or make it again with a "
                "current llama.cpp."
            )


def plain(value: Any) -> Any:
    """A number of numpy's as Python's; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value


def decimal(value: float) -> float:
    """The number that a float32 in the file was written for: the shortest that rounds to it."""
    if not abs(value) < 3e38:
        return value
    for digits in range(6, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value
