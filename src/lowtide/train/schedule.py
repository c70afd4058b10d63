"""Learning rates as pure functions of the update's number, so that resuming needs nothing of them.

The formulas are those of transformers' `get_scheduler`, to which tests hold them; the first update
is its step 0, so that a warm-up begins at a rate of 0. With p the peak, w updates of warm-up, n
updates in all, and t = update - 1:

    warm-up        p t / w                                       t < w
    constant       p
    linear         m + (p - m) (n - t) / (n - w)                 m = the least rate
    cosine         m + (p - m) (1 + cos(pi (t - w) / (n - w))) / 2
    inverse_sqrt   p sqrt(c / (t - w + c))                       c = w, or 10,000 without warm-up
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowtide.errors import ConfigError

if TYPE_CHECKING:
    from .settings import TrainSettings

DEFAULT_ITERS = 100
_TIMESCALE = 10_000


@dataclass(frozen=True)
class Span:
    """Where a run is between warm-up and end.

    Attributes:
        done: updates made since the warm-up.
        total: updates from the warm-up to the end.
        warmup: updates of the warm-up.
    """

    done: int
    total: int
    warmup: int


def _linear(span: Span) -> float:
    return max(0.0, (span.total - span.done) / max(1, span.total))


def _cosine(span: Span) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * span.done / max(1, span.total)))


def _inverse_sqrt(span: Span) -> float:
    timescale = span.warmup or _TIMESCALE
    return math.sqrt(timescale / (span.done + timescale))


SCHEDULES: dict[str, Callable[[Span], float]] = {
    "constant": lambda span: 1.0,
    "linear": _linear,
    "cosine": _cosine,
    "inverse_sqrt": _inverse_sqrt,
}
"""Name -> the factor of the peak after the warm-up."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each update.

    Attributes:
        kind: a name of SCHEDULES.
        peak: the highest rate.
        updates: of the whole run.
        warmup: updates over which the rate rises from 0.
        least: the rate at which the schedule ends.
    """

    kind: str
    peak: float
    updates: int
    warmup: int = 0
    least: float = 0.0

    @classmethod
    def of(cls, settings: TrainSettings, updates: int) -> Schedule:
        """The schedule of a run.

        Args:
            settings: of the run.
            updates: how many it will make.

        Returns:
            The schedule.

        Raises:
            ConfigError: the run would end before the warm-up does.
        """
        warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * updates)
        if settings.warmup_steps >= updates and settings.warmup_steps:
            raise ConfigError(
                f"--warmup-steps {settings.warmup_steps} is not less than the {updates} updates of "
                "the run, so its learning rate would never be reached. Lower it."
            )
        return cls(settings.lr_schedule, settings.learning_rate, updates, warmup, settings.min_lr)

    def rate(self, step: int) -> float:
        """The learning rate of an update.

        Args:
            step: its number, from 1.

        Returns:
            The rate.
        """
        before = step - 1
        if before < self.warmup:
            return self.peak * before / self.warmup
        span = Span(before - self.warmup, self.updates - self.warmup, self.warmup)
        return self.least + (self.peak - self.least) * SCHEDULES[self.kind](span)


def updates_of(settings: TrainSettings, batches: float) -> int:
    """How many updates a run makes.

    Args:
        settings: of the run.
        batches: of all `epochs` passes over the training data.

    Returns:
        `iters`, or as many as go through the data `epochs` times, the last one rounded up.
    """
    if settings.epochs is None:
        return settings.iters or DEFAULT_ITERS
    return max(1, math.ceil(batches / settings.grad_accumulation_steps))
