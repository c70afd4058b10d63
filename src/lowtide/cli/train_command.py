"""`lowtide train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from shlex import quote

from lowtide.config import given_values, parser_for
from lowtide.data.prepare import PrepareReport
from lowtide.infer.evaluate import Evaluation
from lowtide.model.adapter import Adapter
from lowtide.model.decoder import Decoder
from lowtide.train.history import StepReport, TrainResult
from lowtide.train.observers import Quiet, Sample
from lowtide.train.resume import Resumption, settle
from lowtide.train.run import train
from lowtide.train.settings import TrainSettings

from .output import Output, count, duration, megabytes

_DESCRIPTION = (
    "Fine-tune a LoRA adapter. Writes PEFT's adapter_model.safetensors and adapter_config.json, "
    "run.yaml (all settings), metrics.jsonl (one line per update) and events.jsonl."
)


def run(argv: Sequence[str]) -> int:
    """Train; exit code 130 when interrupted, with the adapter saved."""
    parsed = parser_for(TrainSettings, "lowtide train", _DESCRIPTION).parse_strictly(argv)
    settings, output = settle(given_values(parsed)), Output(parsed.json)
    output.goes_on = True  # a closed terminal or pipe must not cost a long run
    progress = Progress(settings, output)
    try:
        result = train(settings, observer=progress)
    finally:
        progress.close()
    if result.steps:
        _summary(settings, result, output)
    else:
        output.say("interrupted before the first update; nothing was written")
    output.result({**asdict(result), "adapter_path": settings.adapter_path})
    return 130 if result.interrupted else 0


class Progress(Quiet):
    """A live bar on a terminal, a line every `steps_per_report` updates elsewhere."""

    def __init__(self, settings: TrainSettings, output: Output) -> None:
        """Nothing is drawn before the first step."""
        self._settings, self._output = settings, output
        self._bar: _Bar | None = None
        self._iters = 0
        self._wall, self._step = 0.0, 0
        self._first = 1
        self._recent: list[StepReport] = []

    def on_resume(self, resumption: Resumption) -> None:
        """Say where the run goes on, and what is no longer as it was."""
        for text in resumption.damaged:
            self._output.say(f"damaged  {text}; the one before is used")
        self._output.say(f"resumed  {resumption.checkpoint.directory}")
        for text in resumption.changes:
            self._output.say(f"changed  {text}")
        self._first = resumption.step + 1

    def on_model(self, model: Decoder, adapter: Adapter) -> None:
        """Say what is trained."""
        spec = model.spec
        self._output.say(
            f"model    {model.directory} ({spec.model_type}, {count(spec.n_parameters)} "
            f"parameters, {'/'.join(model.stored_dtypes)} mapped from "
            f"{megabytes(model.checkpoint.nbytes)})"
        )
        self._output.say(
            f"adapter  LoRA r={adapter.config.r} on {', '.join(_short(adapter))}: "
            f"{count(adapter.n_parameters)} parameters"
        )

    def on_data(self, report: PrepareReport) -> None:
        """Say what was read, cut and dropped."""
        for name, split in report.splits.items():
            self._output.say(f"{name:<8} {split.summary()}")

    def on_start(self, iters: int) -> None:
        """Set up the bar, where there is a terminal."""
        self._iters = iters
        if self._first > iters:
            self._output.say(f"all {iters} updates are made; --iters or --epochs goes on")
        if self._output.stream.isatty():
            self._bar = _Bar(iters, self._output)

    def on_step(self, report: StepReport) -> None:
        """Advance the bar, or print a line now and then."""
        self._wall += report.wall_s
        self._step = report.step
        self._recent.append(report)
        made = report.step - self._first + 1
        left = (self._iters - report.step) * self._wall / made
        due = report.step % self._settings.steps_per_report == 0
        if self._bar is not None:
            self._bar.advance(report, left)
        elif due or report.step in (self._first, self._iters):
            loss = sum(r.loss * r.n_tokens for r in self._recent) / sum(
                r.n_tokens for r in self._recent
            )
            self._output.say(
                f"step {report.step}/{self._iters}  loss {loss:.4f}{self._rate(report)}  "
                f"{report.tokens_per_s:,.0f} tokens/s  "
                f"peak {megabytes(report.peak_anon_bytes)}  {duration(left)} left"
            )
        if due:
            self._recent.clear()

    def _rate(self, report: StepReport) -> str:
        """The learning rate, where it changes."""
        s = self._settings
        changes = s.lr_schedule != "constant" or s.warmup_steps or s.warmup_ratio
        return f"  rate {report.learning_rate:.2e}" if changes else ""

    def on_valid(self, step: int, result: Evaluation) -> None:
        """Print the validation loss."""
        self._output.say(
            f"step {step}/{self._iters}  validation loss {result.loss:.4f} "
            f"({result.n_tokens:,} tokens)"
        )

    def on_save(self, step: int) -> None:
        """Print where the checkpoint went."""
        self._output.say(f"step {step}: saved to {self._settings.adapter_path}")

    def on_sample(self, sample: Sample) -> None:
        """Print it, in short."""
        self._output.say(f"step {sample.step}: {sample.prompt!r} -> {sample.text!r}")

    def on_pause(self, reason: str | None) -> None:
        """Say why the run pauses, and that it goes on."""
        step = self._step
        self._output.say(f"paused after step {step}: {reason}" if reason else "going on")

    def on_stopping(self) -> None:
        """Say that a signal was heard."""
        self._output.say("\nfinishing this update, then saving; once more stops at once")

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.close()


class _Bar:
    """rich's progress bar: step, loss, tokens/s, peak memory, time left."""

    def __init__(self, iters: int, output: Output) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._progress = RichProgress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[now]}"),
            console=Console(file=output.stream), refresh_per_second=4,
        )  # fmt: skip
        self._task = self._progress.add_task("train", total=iters, now="")
        self._started = False

    def advance(self, report: StepReport, left: float) -> None:
        """Show one more update."""
        if not self._started:
            self._progress.start()
            self._started = True
        now = (
            f"loss {report.loss:.4f}  {report.tokens_per_s:,.0f} tokens/s  "
            f"peak {megabytes(report.peak_anon_bytes)}  {duration(left)} left"
        )
        self._progress.update(self._task, completed=report.step, now=now)

    def close(self) -> None:
        """Stop drawing."""
        if self._started:
            self._progress.stop()


def _short(adapter: Adapter) -> list[str]:
    return [module.split(".")[-1] for module in adapter.modules]


def _summary(settings: TrainSettings, result: TrainResult, output: Output) -> None:
    verb = "interrupted after" if result.interrupted else "done:"
    if result.stopped_early:
        verb = (
            f"stopped early, after {settings.early_stopping_patience} validations without "
            "improvement:"
        )
    valid = "" if result.valid_loss is None else f", validation loss {result.valid_loss:.4f}"
    output.say(
        f"{verb} {result.steps} updates, {result.n_tokens:,} trained tokens in "
        f"{duration(result.wall_s)} ({duration(result.cpu_s)} CPU), last loss "
        f"{result.loss:.4f}{valid}"
    )
    output.say(
        f"peak_anon_bytes {megabytes(result.peak_anon_bytes)} (private memory above the import), "
        f"peak_rss_bytes {megabytes(result.peak_rss_bytes)} (whole process, mapped weights "
        "included)"
    )
    output.say(
        f"try it: lowtide generate --model {quote(settings.model)} --adapter-path "
        f'{quote(settings.adapter_path)} --prompt "..."'
    )
