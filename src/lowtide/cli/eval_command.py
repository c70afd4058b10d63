"""`lowtide eval`."""

from __future__ import annotations

from collections.abc import Sequence

from lowtide.train.evaluating import EvalSettings, evaluate

from .output import settings_of


def run(argv: Sequence[str]) -> int:
    """Print loss, perplexity and the number of tokens."""
    settings, output = settings_of(
        EvalSettings, "eval", "Loss and perplexity of a model, with or without an adapter.", argv
    )
    result = evaluate(settings, on_data=lambda summary: output.say(f"data  {summary}"))
    output.say(
        f"loss {result.loss:.4f} nats per token, perplexity {result.perplexity:,.2f}, "
        f"{result.n_tokens:,} tokens"
    )
    output.result(
        {"loss": result.loss, "perplexity": result.perplexity, "n_tokens": result.n_tokens}
    )
    return 0
