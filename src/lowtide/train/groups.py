"""Parameters that learn at a rate of their own or decay: LoRA+ and weight decay groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from lowtide.errors import ConfigError

if TYPE_CHECKING:
    from .recipe import OptimizerSettings

_ALL = "all"


class Rates(NamedTuple):
    """What scales the update of one parameter."""

    learning_rate: float
    weight_decay: float


class Groups:
    """Each parameter's share of the learning rate, and its weight decay.

    LoRA+ (arXiv 2402.12354) gives B, and vectors, `loraplus_lr_ratio` times the rate of A: the
    groups of `peft.optimizers.create_loraplus_optimizer`.
    """

    def __init__(self, settings: OptimizerSettings, parameters: Mapping[str, Tensor]) -> None:
        """Assign each parameter.

        Args:
            settings: the ratio, the decay and what decays.
            parameters: by PEFT name.

        Raises:
            ConfigError: `weight_decay_on` names a part that no parameter's name has.
        """
        decaying = _decaying(settings.weight_decay_on, parameters)
        self._of = {
            name: Rates(
                settings.loraplus_lr_ratio if ".lora_B." in name or p.ndim == 1 else 1.0,
                settings.weight_decay if name in decaying else 0.0,
            )
            for name, p in parameters.items()
        }

    def rates(self, name: str, learning_rate: float) -> Rates:
        """Of one parameter, where the learning rate of A is that."""
        own = self._of[name]
        return Rates(learning_rate * own.learning_rate, own.weight_decay)


def _decaying(asked: str, names: Iterable[str]) -> set[str]:
    """The names that have one of the asked parts: whole components, such as `q_proj.lora_A`."""
    parts = [part.strip() for part in asked.split(",") if part.strip()]
    names = list(names)
    if parts == [_ALL]:
        return set(names)
    matches = {part: {name for name in names if f".{part}." in f".{name}."} for part in parts}
    unknown = [repr(part) for part, found in matches.items() if not found]
    if unknown or not parts:
        known = dict.fromkeys(part for name in names for part in name.split(".")[-4:-1])
        raise ConfigError(
            f"--weight-decay-on {', '.join(unknown) or repr(asked)} is no part of a parameter's "
            f"name. Choose '{_ALL}', or among {', '.join(known)}, also joined by dots."
        )
    return set().union(*matches.values())
