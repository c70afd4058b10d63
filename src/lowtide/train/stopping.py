"""Early stopping: a run ends when validations no longer improve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lowtide.errors import ConfigError

from .recipe import RecipeSettings

if TYPE_CHECKING:
    from .settings import TrainSettings


class EarlyStopping:
    """Counts validations in a row that did not improve on the best by more than `min_delta`.

    Small gains add up: the best is what the last improvement reached, so that several of them, each
    below `min_delta`, are one together.
    """

    def __init__(self, patience: int | None, min_delta: float = 0.0) -> None:
        """Nothing has been validated.

        Args:
            patience: validations without improvement that end the run; None never ends it.
            min_delta: the loss must fall by more than this.
        """
        self._patience, self._min_delta = patience, min_delta
        self.best, self.waited = math.inf, 0

    @classmethod
    def of(cls, settings: RecipeSettings) -> EarlyStopping:
        """As the settings ask."""
        return cls(settings.early_stopping_patience, settings.early_stopping_min_delta)

    def see(self, loss: float) -> None:
        """Take the loss of a validation."""
        if loss < self.best - self._min_delta:
            self.best, self.waited = loss, 0
        else:
            self.waited += 1

    def state(self) -> dict[str, float]:
        """What `go_on` takes; empty before the first validation."""
        return {} if math.isinf(self.best) else {"best": self.best, "waited": self.waited}

    def go_on(self, state: Mapping[str, float]) -> None:
        """Count on from an earlier sitting of the run."""
        self.best, self.waited = state.get("best", math.inf), int(state.get("waited", 0))

    @property
    def due(self) -> bool:
        """Whether the run should end."""
        return self._patience is not None and self.waited >= self._patience


def check_stopping(settings: TrainSettings, iters: int, validates: bool) -> None:
    """Refuse patience that could never end the run.

    Args:
        settings: of the run.
        iters: updates it will make.
        validates: whether there is validation data.

    Raises:
        ConfigError: says what is missing.
    """
    patience = settings.early_stopping_patience
    if patience is None:
        return
    if not validates:
        raise ConfigError(
            "--early-stopping-patience counts validations, and there is no validation data. "
            "Give --valid-data or --valid-records."
        )
    before_the_end = (iters - 1) // settings.steps_per_eval
    if before_the_end < patience:
        raise ConfigError(
            f"--early-stopping-patience {patience} could never end this run: of its {iters} "
            f"updates, validations after the first come every {settings.steps_per_eval} "
            f"(--steps-per-eval), {before_the_end} before the end. Lower either."
        )
