"""`lowtide eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowtide.config import setting
from lowtide.data.cache import TokenDataset
from lowtide.data.prepare import prepare
from lowtide.infer.evaluate import evaluate
from lowtide.methods import get_method
from lowtide.model.adapter import Adapter
from lowtide.train.recipe import MAX_BATCH
from lowtide.train.run import check_length, data_request, open_model
from lowtide.train.settings import DataSettings, ModelSettings

from .output import settings_of


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


def run(argv: Sequence[str]) -> int:
    """Print loss, perplexity and the number of tokens."""
    settings, output = settings_of(
        EvalSettings, "eval", "Loss and perplexity of a model, with or without an adapter.", argv
    )
    model = open_model(settings)
    check_length(model, settings.max_seq_length)
    adapter = None
    if settings.adapter_path is not None:
        adapter = Adapter.load(Path(settings.adapter_path).expanduser(), model)
    split = prepare(data_request(settings, model, settings.data, split="eval")).splits["eval"]
    output.say(f"data  {split.summary()}")
    result = evaluate(
        model, adapter, TokenDataset.open(split.path), get_method("mesp"),
        batch_size=settings.batch_size,
    )  # fmt: skip
    output.say(
        f"loss {result.loss:.4f} nats per token, perplexity {result.perplexity:,.2f}, "
        f"{result.n_tokens:,} tokens"
    )
    output.result(
        {"loss": result.loss, "perplexity": result.perplexity, "n_tokens": result.n_tokens}
    )
    return 0
