"""A run at a glance, in a terminal: redrawn after updates, at most four times a second."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from lowtide.device import Paced, temperature_c
from lowtide.infer.evaluate import Evaluation
from lowtide.train.history import StepReport
from lowtide.train.observers import Quiet, Sample

from .output import Output, discard, duration, megabytes
from .trace import Trace

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.text import Text

_EVERY_S, _SENSORS_S, _RECENT = 0.25, 5.0, 20
_LABEL = 8
_SPARE = 3
"""Columns left free: a terminal shows ^C behind the last line, and must not begin a new one."""


class LiveView(Quiet):
    """Draws the state of a run over and over in the same lines.

    rich is imported here and nowhere else in a training process: it takes 3.5 MB.
    """

    def __init__(self, output: Output, iters: int, budget_bytes: int | None) -> None:
        """Nothing is drawn before the first update.

        Args:
            output: a terminal's.
            iters: updates in all.
            budget_bytes: `--memory-budget`, where there is one.
        """
        from rich.console import Console
        from rich.live import Live

        self._output, self._iters, self._budget = output, iters, budget_bytes
        self._console: Console = Console(file=output.stream)
        self._live: Live | None = Live(
            console=self._console, auto_refresh=False, vertical_overflow="crop",
            redirect_stdout=output.stream.isatty(),
        )  # fmt: skip
        self._temperature = Paced(temperature_c, _SENSORS_S)
        self._losses, self._peak = Trace(), 0
        self._recent: deque[StepReport] = deque(maxlen=_RECENT)
        self._valid: list[tuple[int, float]] = []
        self._sample: Sample | None = None
        self._saved: int | None = None
        self._state = ""
        self._began = self._drawn = self._paused_at = time.monotonic()
        self._made = 0

    def on_step(self, report: StepReport) -> None:
        """Redraw, where it is time."""
        self._losses.add(report.loss)
        self._recent.append(report)
        self._peak = max(self._peak, report.peak_anon_bytes)
        self._made += 1
        last = report.step == self._iters
        if self._made == 1 or last or time.monotonic() - self._drawn >= _EVERY_S:
            self._draw()

    def on_valid(self, step: int, result: Evaluation) -> None:
        """Keep it; the best and the last are shown."""
        self._valid.append((step, result.loss))
        self._valid = [min(self._valid, key=lambda one: one[1]), self._valid[-1]]

    def on_save(self, step: int) -> None:
        """Keep it; the last is shown."""
        self._saved = step

    def on_sample(self, sample: Sample) -> None:
        """Show it."""
        self._sample = sample
        self._draw()

    def on_pause(self, reason: str | None) -> None:
        """Show why, or that it is over; a pause does not count in the time that is left."""
        self._state = f"paused: {reason}" if reason else ""
        if reason:
            self._paused_at = time.monotonic()
        else:
            self._began += time.monotonic() - self._paused_at
        self._draw()

    def on_stopping(self) -> None:
        """Show that a signal was heard."""
        self._state = "finishing this update, then saving; once more stops at once"
        self._draw()

    def close(self) -> None:
        """Draw once more and leave the lines where they are."""
        self._draw()
        if self._live is not None and self._recent:
            self._live.stop()
        self._live = None

    def _draw(self) -> None:
        """Draw what there is, once there is an update."""
        if self._live is None or not self._recent:
            return
        self._drawn = time.monotonic()
        try:
            if not self._live.is_started:
                self._live.start()
            self._live.update(self.rendered(), refresh=True)
        except OSError:  # the terminal is gone, and the run goes on
            self._live = None
            discard(self._output.stream)

    def rendered(self) -> Group:
        """The lines for the terminal's width of now; each stays one line."""
        from rich.console import Group
        from rich.text import Text

        now, width = self._recent[-1], self._console.width - _SPARE
        plain = not self._console.encoding.lower().startswith("utf")
        lines = [self._progress_line(now, width, plain)]
        lines.append(_line("loss", _mean(self._recent), self._losses.line(width - 18, plain)))
        if self._valid:
            (best_step, best), (_, valid) = self._valid[0], self._valid[-1]
            lines.append(_line("valid", f"{valid:.4f}", f"best {best:.4f} at step {best_step:,}"))
        speed = sum(r.tokens_per_s * r.wall_s for r in self._recent) / max(
            1e-9, sum(r.wall_s for r in self._recent)
        )
        celsius = self._temperature()
        heat = "" if celsius is None else f"  {celsius:.0f} °C"
        rate = f"rate {now.learning_rate:.2e}"
        lines.append(_line("speed", f"{speed:,.0f}", f"tokens/s  {rate}{heat}"))
        of = "" if self._budget is None else f"of {megabytes(self._budget)} allowed"
        saved = "" if self._saved is None else f"  saved at step {self._saved:,}"
        lines.append(_line("memory", megabytes(self._peak), f"{of}{saved}".strip()))
        if self._sample is not None:
            text = " ".join(f"{self._sample.prompt} → {self._sample.text}".split())
            lines.append(_line(f"at {self._sample.step:,}", "", text))
        if self._state:
            lines.append(Text(self._state, style="bold yellow"))
        for line in lines:
            line.truncate(max(1, width), overflow="ellipsis")
        return Group(*lines)

    def _progress_line(self, now: StepReport, width: int, plain: bool) -> Text:
        """Update, bar, share, time left."""
        from rich.text import Text

        done = now.step / max(1, self._iters)
        each = (time.monotonic() - self._began) / self._made
        head = f"{'step':<{_LABEL}} {now.step:,}/{self._iters:,} "
        tail = f" {done:4.0%}  {duration((self._iters - now.step) * each)} left"
        room = max(0, min(48, width - len(head) - len(tail)))
        full = round(done * room)
        bar, rest = ("#", "-") if plain else ("━", "─")
        return Text.assemble(
            (head[:_LABEL], "dim"), head[_LABEL:], (bar * full, "cyan"),
            (rest * (room - full), "dim"), tail,
        )  # fmt: skip


def _line(label: str, value: str, more: str) -> Text:
    from rich.text import Text

    return Text.assemble(
        (f"{label[:_LABEL]:<{_LABEL}}", "dim"), " ", (f"{value} " if value else "", "bold"), more
    )


def _mean(reports: deque[StepReport]) -> str:
    """The loss per token over the last updates."""
    tokens = sum(report.n_tokens for report in reports)
    return f"{sum(r.loss * r.n_tokens for r in reports) / max(1, tokens):.4f}"
