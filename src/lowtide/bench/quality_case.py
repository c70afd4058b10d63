"""`lowtide bench quality`: MeZO's estimate against the exact gradient, on random token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowtide.config import setting
from lowtide.errors import ConfigError
from lowtide.model.adapter import Adapter
from lowtide.model.batch import Batch
from lowtide.train.lora_settings import LoraSettings
from lowtide.train.run import check_length, open_model

from .quality import gradient_quality
from .step import ShapeModelSettings, located, nothing_said

_B_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class QualitySettings(LoraSettings, ShapeModelSettings):
    """Settings of `lowtide bench quality`."""

    directions: str = setting(
        "1,4,16,64", help="numbers of random directions, separated by commas", listed=True
    )
    seq_len: int = setting(64, help="tokens of the one sequence", minimum=2)
    seed: int = setting(0, help="seed of adapter, token ids and directions", minimum=0)


def bench_quality(
    settings: QualitySettings, say: Callable[[str], None] = nothing_said
) -> dict[str, Any]:
    """Cosine of MeZO's estimates with the exact gradient.

    Args:
        settings: model, adapter, numbers of directions.
        say: told of what takes long before.

    Returns:
        What `gradient_quality` returns.

    Raises:
        ConfigError: `directions` is not a list of whole numbers of at least 1.
        ModelError: there is no such shape or model, or it is not supported.
        DataError: the sequence is longer than the model's positions.
    """
    try:
        directions = [int(number) for number in settings.directions.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"directions = {settings.directions!r}: expected whole numbers separated by commas, "
            "such as 1,4,16."
        ) from error
    model = open_model(located(settings, say))
    check_length(model, settings.seq_len)
    adapter = Adapter.create(model, settings.lora_config(model.spec), settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    for name, parameter in adapter.items():
        if ".lora_B." in name:  # zero in a fresh adapter, and then no gradient reaches A
            parameter.normal_(0.0, _B_STD, generator=generator)
    ids = torch.randint(0, model.spec.vocab_size, (settings.seq_len,), generator=generator)
    batch = Batch.from_sequences([ids.tolist()])
    return gradient_quality(model, adapter, batch, directions, settings.seed)


def quality_lines(result: Mapping[str, Any]) -> list[str]:
    """The result as a table for people.

    Args:
        result: of `bench_quality`.

    Returns:
        Its lines.
    """
    counts = [str(count) for count in result["directions"]]
    head = f"{'directions':<12}" + "".join(f"{count:>10}" for count in counts)
    overall = result["overall"]
    rows = [
        ("cosine", [overall[count]["cosine"] for count in counts]),
        ("expected", [overall[count]["expected"] for count in counts]),
    ]
    rows += [
        (f"layer {one['layer']}", [one["cosine"][count] for count in counts])
        for one in result["layers"]
    ]
    return [
        f"MeZO's cosine with the exact gradient, {result['n_parameters']:,} parameters",
        head,
        *(f"{name:<12}" + "".join(f"{value:>10.5f}" for value in row) for name, row in rows),
    ]
