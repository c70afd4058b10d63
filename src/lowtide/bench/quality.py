"""How near MeZO's estimate comes to the exact gradient, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lowtide.check.run import expected_cosine
from lowtide.errors import ConfigError
from lowtide.methods import get_method, gradients
from lowtide.model.adapter import Adapter
from lowtide.model.batch import Batch
from lowtide.model.decoder import Decoder


def gradient_quality(
    model: Decoder,
    adapter: Adapter,
    batch: Batch,
    directions: Sequence[int] = (1, 4, 16, 64),
    seed: int = 0,
) -> dict[str, Any]:
    """Cosine of SPSA estimates of 1 to many directions with the exact gradient.

    The mean of k directions is that of the first k, so all together cost two forwards for each of
    the most, and the exact gradient once. Three gradients are held at a time.

    Args:
        model: the frozen model.
        adapter: LoRA matrices; B should not be zero, or the gradients of A are.
        batch: sequences and labels.
        directions: numbers of directions to report.
        seed: of the directions.

    Returns:
        `n_parameters`, `directions`, `overall` with `cosine` and `expected` (the size that theory
        gives) by number, and `layers` with `cosine` by number.

    Raises:
        ConfigError: a number of directions is below 1, or there is none.
        DataError: no position carries a label, or a sequence does not fit the model.
        TrainingError: the loss is not finite.
    """
    wanted = sorted(set(directions))
    if not wanted or wanted[0] < 1:
        raise ConfigError(f"directions are {list(directions)}; expected numbers of at least 1.")
    exact = gradients(model, adapter, batch, "mesp").grads
    layers = _layers(model, adapter)
    mezo = get_method("mezo")
    total: dict[str, Tensor] = {}
    overall: dict[str, dict[str, float]] = {}
    by_layer: dict[int, dict[str, float]] = {layer: {} for layer in layers}
    for number in range(wanted[-1]):
        # A seed for each direction; `seed` itself spaces runs apart.
        one = gradients(model, adapter, batch, mezo, seed=seed * wanted[-1] + number).grads
        for name, estimate in one.items():
            total[name] = total[name].add_(estimate) if name in total else estimate
        del one
        if number + 1 in wanted:
            key = str(number + 1)
            products = {layer: _products(total, exact, names) for layer, names in layers.items()}
            for layer, parts in products.items():
                by_layer[layer][key] = _cosine(parts)
            whole = tuple(map(sum, zip(*products.values(), strict=True)))
            expected = expected_cosine(number + 1, adapter.n_parameters)
            overall[key] = {"cosine": _cosine(whole), "expected": expected}
    return {
        "n_parameters": adapter.n_parameters,
        "directions": wanted,
        "overall": overall,
        "layers": [
            {
                "layer": layer,
                "n_parameters": sum(exact[name].numel() for name in names),
                "cosine": by_layer[layer],
            }
            for layer, names in layers.items()
        ],
    }


def _layers(model: Decoder, adapter: Adapter) -> dict[int, list[str]]:
    """The adapter's parameters by block; blocks without any are left out."""
    layers = {layer: list(adapter.of_layer(layer)) for layer in range(model.spec.num_layers)}
    return {layer: names for layer, names in layers.items() if names}


def _products(
    ours: dict[str, Tensor], truth: dict[str, Tensor], names: Sequence[str]
) -> tuple[float, ...]:
    """`<ours, truth>`, `|ours|^2` and `|truth|^2` over these parameters, in float64."""
    dot = ours_square = truth_square = 0.0
    for name in names:
        a, b = ours[name].double().flatten(), truth[name].double().flatten()
        dot += float(a.dot(b))
        ours_square += float(a.dot(a))
        truth_square += float(b.dot(b))
    return dot, ours_square, truth_square


def _cosine(products: Sequence[float]) -> float:
    """From the three products; 0 where either gradient is zero."""
    dot, ours, truth = products
    return dot / math.sqrt(ours) / math.sqrt(truth) if ours and truth else 0.0
