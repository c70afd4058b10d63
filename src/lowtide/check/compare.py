"""Two gradients compared, parameter by parameter and module by module.

The error of a parameter is `|ours - truth| / |truth|` in the 2-norm. A parameter whose true
gradient is less than 1e-7 of the whole has next to none (attention to a single key, say): what is
computed there is the rounding of larger things, and it is measured against the whole's norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

_NO_GRADIENT = 1e-7


@dataclass(frozen=True)
class Part:
    """What one module, or the whole, came to.

    Attributes:
        worst_relative_error: the largest of any parameter.
        worst_parameter: whose that is, by PEFT's name.
        cosine: of all the parameters' gradients as one vector; 1 where both are zero.
    """

    worst_relative_error: float
    worst_parameter: str
    cosine: float


@dataclass(frozen=True)
class Comparison:
    """One method in one precision against one truth.

    Attributes:
        precision: of ours.
        against: the truth's name.
        whole: over all parameters.
        modules: by module (`q_proj`), over all layers.
        bound: of the worst parameter's error.
        exceeded: each parameter over its bound: its error and its bound.
    """

    precision: str
    against: str
    whole: Part
    modules: Mapping[str, Part]
    bound: float
    exceeded: Mapping[str, tuple[float, float]]

    @property
    def passed(self) -> bool:
        """Whether no parameter is over its bound."""
        return not self.exceeded


def compare(
    ours: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    bounds: Mapping[str, float],
    *,
    precision: str,
    against: str,
) -> Comparison:
    """Hold one gradient against another.

    Args:
        ours: by parameter; the same as in the truth.
        truth: by parameter.
        bounds: the largest error allowed, by parameter.
        precision: of ours, for the record.
        against: the truth's name, for the record.

    Returns:
        The comparison.
    """
    errors = relative_errors(ours, truth)
    names: dict[str, list[str]] = {}
    for name in truth:
        names.setdefault(module_of(name), []).append(name)
    whole = _part(list(truth), errors, ours, truth)
    return Comparison(
        precision=precision,
        against=against,
        whole=whole,
        modules={module: _part(own, errors, ours, truth) for module, own in names.items()},
        bound=bounds[whole.worst_parameter],
        exceeded={
            name: (error, bounds[name]) for name, error in errors.items() if error > bounds[name]
        },
    )


def relative_errors(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """The error of each parameter; infinite where ours is not finite."""
    errors = {}
    sizes = measured_against(truth)
    for name, grad in truth.items():
        difference = float((ours[name].double() - grad.double()).norm())
        error = 0.0
        if difference:
            error = difference / sizes[name] if sizes[name] else math.inf
        errors[name] = error if math.isfinite(error) else math.inf
    return errors


def measured_against(truth: Mapping[str, Tensor]) -> dict[str, float]:
    """What each parameter's error is divided by: its norm, or the whole's if it has next to none.

    Args:
        truth: by parameter.

    Returns:
        Norms; zero only where the whole gradient is zero.
    """
    norms = {name: float(grad.double().norm()) for name, grad in truth.items()}
    whole = math.hypot(*norms.values())
    return {name: norm if norm > _NO_GRADIENT * whole else whole for name, norm in norms.items()}


def cosine(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Cosine of two gradients as vectors; a parameter that ours lacks counts as zeros.

    Args:
        ours: by parameter.
        truth: by parameter.

    Returns:
        Between -1 and 1; 1 where both are zero, 0 where one is.
    """
    dot = ours_square = truth_square = 0.0
    for name, grad in truth.items():
        wide = grad.double().flatten()
        truth_square += float(wide.dot(wide))
        if name in ours:
            own = ours[name].double().flatten()
            dot += float(own.dot(wide))
            ours_square += float(own.dot(own))
    if not ours_square or not truth_square:
        return float(ours_square == truth_square)
    return max(-1.0, min(1.0, dot / math.sqrt(ours_square) / math.sqrt(truth_square)))


def module_of(name: str) -> str:
    """`q_proj` of `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`."""
    return name.split(".lora_")[0].split(".")[-1]


def _part(
    names: list[str],
    errors: Mapping[str, float],
    ours: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
) -> Part:
    worst = max(names, key=lambda name: errors[name])
    return Part(errors[worst], worst, cosine(ours, {name: truth[name] for name in names}))
