"""What updates did, one by one and together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lowtide.notebook import megabytes, table


@dataclass(frozen=True)
class StepReport:
    """One update, as progress shows it and metrics.jsonl keeps it."""

    step: int
    loss: float
    n_tokens: int
    wall_s: float
    cpu_s: float
    tokens_per_s: float
    peak_anon_bytes: int
    peak_rss_bytes: int
    peak_file_bytes: int
    disk_read_bytes: int
    learning_rate: float
    grad_norm: float
    grad_norms: list[float | None]


@dataclass(frozen=True)
class TrainResult:
    """What a finished run did."""

    steps: int
    loss: float
    valid_loss: float | None
    n_tokens: int
    wall_s: float
    cpu_s: float
    peak_anon_bytes: int
    peak_rss_bytes: int
    interrupted: bool = False
    stopped_early: bool = False
    saved_step: int | None = None
    """The step whose adapter lies in the output directory."""
    best_step: int | None = None
    """The step whose adapter lies in `best`, by validation loss."""
    best_valid_loss: float | None = None

    def _repr_html_(self) -> str:
        rows = [("updates", f"{self.steps:,}"), ("loss", f"{self.loss:.4f}")]
        if self.valid_loss is not None:
            rows.append(("validation loss", f"{self.valid_loss:.4f}"))
        if self.best_step is not None:
            rows.append(("best at update", f"{self.best_step:,}"))
        rows += [
            ("trained tokens", f"{self.n_tokens:,}"),
            ("time", f"{self.wall_s:,.1f} s"),
            ("peak_anon_bytes", megabytes(self.peak_anon_bytes)),
        ]
        return table("a run", rows)


@dataclass
class History:
    """Of all updates since the run began, resumptions included; checkpoints keep it."""

    step: int = 0
    loss: float | None = None
    """Of the last update."""
    n_tokens: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_anon_bytes: int = 0
    peak_rss_bytes: int = 0
    valid_loss: float | None = None
    """Of the last validation."""
    validated_step: int | None = None
    best_valid_loss: float | None = None
    best_step: int | None = None
    stopping: dict[str, float] = field(default_factory=dict)
    """What early stopping goes on from."""
    stopped_early: bool = False

    def add(self, report: StepReport) -> None:
        """An update was made."""
        self.step, self.loss = report.step, report.loss
        self.n_tokens += report.n_tokens
        self.wall_s += report.wall_s
        self.cpu_s += report.cpu_s
        self.peak_anon_bytes = max(self.peak_anon_bytes, report.peak_anon_bytes)
        self.peak_rss_bytes = max(self.peak_rss_bytes, report.peak_rss_bytes)

    def validated(self, loss: float) -> bool:
        """A validation was made after the last update.

        Args:
            loss: its loss.

        Returns:
            Whether it is the best so far; the first one is.
        """
        self.valid_loss, self.validated_step = loss, self.step
        if self.best_valid_loss is not None and loss >= self.best_valid_loss:
            return False
        self.best_valid_loss, self.best_step = loss, self.step
        return True

    def result(self, interrupted: bool, saved_step: int | None) -> TrainResult:
        """All of it, for whoever started the run.

        Args:
            interrupted: whether the run was ended from outside.
            saved_step: the step whose adapter lies in the output directory.

        Returns:
            The summary.
        """
        return TrainResult(
            steps=self.step,
            loss=math.nan if self.loss is None else self.loss,
            valid_loss=self.valid_loss,
            n_tokens=self.n_tokens,
            wall_s=self.wall_s,
            cpu_s=self.cpu_s,
            peak_anon_bytes=self.peak_anon_bytes,
            peak_rss_bytes=self.peak_rss_bytes,
            interrupted=interrupted,
            stopped_early=self.stopped_early,
            saved_step=saved_step,
            best_step=self.best_step,
            best_valid_loss=self.best_valid_loss,
        )
