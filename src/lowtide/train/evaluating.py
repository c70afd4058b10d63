"""An evaluation from settings: what `lowtide eval` and `lowtide.evaluate` do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowtide.config import build, setting
from lowtide.data.cache import TokenDataset
from lowtide.data.prepare import prepare
from lowtide.infer.evaluate import Evaluation
from lowtide.infer.evaluate import evaluate as evaluate_set
from lowtide.methods import get_method
from lowtide.model.adapter import Adapter

from .recipe import MAX_BATCH
from .run import check_length, data_request, open_model
from .settings import DataSettings, ModelSettings


@dataclass(frozen=True, kw_only=True)
class EvalSettings(DataSettings, ModelSettings):
    """Settings of `lowtide eval`."""

    data: str = setting(
        help="file, or directory whose test (else valid) split is evaluated", filled=True
    )
    adapter_path: str | None = setting(None, help="PEFT adapter directory to apply", filled=True)
    batch_size: int = setting(
        1, help="sequences at a time; the result is the same", minimum=1, maximum=MAX_BATCH
    )


def evaluate(
    settings: EvalSettings | None = None,
    *,
    on_data: Callable[[str], None] | None = None,
    **given: Any,
) -> Evaluation:
    """Loss and perplexity of a model on a data set: what `lowtide eval` prints.

    Args:
        settings: all settings; or give them as keywords instead.
        on_data: told in a line what the data holds.
        **given: settings by name, such as `model=`, `data=`, `adapter_path=`.

    Returns:
        The loss, and over how many tokens.

    Raises:
        ConfigError: a setting is wrong.
        ModelError: the model cannot be used.
        DataError: the data cannot be used.
        AdapterError: the adapter does not fit.
        TrainingError: the loss is not finite.
    """
    settings = build(EvalSettings, given if settings is None else asdict(settings))
    model = open_model(settings)
    check_length(model, settings.max_seq_length)
    adapter = None
    if settings.adapter_path is not None:
        adapter = Adapter.load(Path(settings.adapter_path).expanduser(), model)
    split = prepare(data_request(settings, model, settings.data, split="eval")).splits["eval"]
    if on_data is not None:
        on_data(split.summary())
    return evaluate_set(
        model, adapter, TokenDataset.open(split.path), get_method("mesp"),
        batch_size=settings.batch_size,
    )  # fmt: skip
