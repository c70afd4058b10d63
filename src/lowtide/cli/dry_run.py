"""What `lowtide train --dry-run` prints: a sample with its masks, the plan, and one update."""

from __future__ import annotations

from collections.abc import Iterator

from lowtide.data.sample import Shown
from lowtide.train.rehearsal import Rehearsal
from lowtide.train.settings import TrainSettings

from .output import Output, duration, megabytes

_SHOWN_RECORDS = 3
_SHOWN_CHARS = 600


def say_rehearsal(rehearsal: Rehearsal, settings: TrainSettings, output: Output) -> None:
    """Print all of it.

    Args:
        rehearsal: what was found.
        settings: of the run.
        output: where to.
    """
    coloured = output.stream.isatty()
    trained = sum(sum(one.trained[1:]) for one in rehearsal.shown)
    tokens = sum(len(one.ids) for one in rehearsal.shown)
    output.say(
        f"sample   the first {len(rehearsal.shown)} records: {tokens:,} tokens, {trained:,} "
        "trained on. `lowtide data check` looks at all records"
    )
    for number, one in enumerate(rehearsal.shown[:_SHOWN_RECORDS], start=1):
        cut = f", {one.dropped_tokens:,} more cut off" if one.dropped_tokens else ""
        output.say(
            f"record {number}: {len(one.ids):,} tokens, {sum(one.trained[1:]):,} trained on{cut}"
        )
        if coloured:
            _paint(one, output)
        else:
            for line in plain_lines(one):
                output.say(line)
    for line in _plan_lines(rehearsal, settings):
        output.say(line)
    step = rehearsal.step
    output.say(
        f"step     one update of {settings.batch_size} of them: loss {step.loss:.4f} over "
        f"{step.n_tokens:,} tokens, {duration(step.wall_s)}, peak_anon_bytes "
        f"{megabytes(step.peak_anon_bytes)}"
    )
    output.say("nothing was written; leave --dry-run out to train")


def plain_lines(one: Shown) -> Iterator[str]:
    """A line for each run of tokens, with what is not printable escaped."""
    left = _SHOWN_CHARS
    for trained, text in one.runs:
        if left <= 0:
            yield "           | ..."
            return
        yield f"  {'trained' if trained else 'masked':<8} | {_escaped(text[:left])}"
        left -= len(text)


def _paint(one: Shown, output: Output) -> None:
    from rich.console import Console
    from rich.text import Text

    painted, left = Text(), _SHOWN_CHARS
    for trained, text in one.runs:
        shown = _escaped(text[: max(0, left)]).replace("\\n", "⏎\n")
        painted.append(shown, style="bold green" if trained else "dim")
        left -= len(text)
    if left < 0:
        painted.append(" ...", style="dim")
    console = Console(file=output.stream, highlight=False)
    console.print(painted)
    console.print(Text.assemble(("trained on", "bold green"), "  ", ("masked", "dim")))


def _plan_lines(rehearsal: Rehearsal, settings: TrainSettings) -> Iterator[str]:
    tokens = sum(rehearsal.lengths)
    if rehearsal.predicted_peak_bytes is None:
        yield f"plan     the memory of --method {settings.method} is autograd's to decide"
        return
    largest = sorted(rehearsal.by_kind.items(), key=lambda item: -item[1])[:4]
    kinds = ", ".join(f"{kind} {megabytes(count)}" for kind, count in largest if count)
    yield (
        f"plan     predicted peak {megabytes(rehearsal.predicted_peak_bytes)} for the largest "
        f"batch that the settings allow ({tokens:,} tokens): {kinds}"
    )


def _escaped(text: str) -> str:
    """Control characters as Python writes them, so that no data commands the terminal."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )
