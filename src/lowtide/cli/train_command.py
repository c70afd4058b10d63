"""`lowtide train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from lowtide.config import given_values, parser_for
from lowtide.data.prepare import PrepareReport
from lowtide.infer.evaluate import Evaluation
from lowtide.model.adapter import Adapter
from lowtide.model.decoder import Decoder
from lowtide.model.spec import ModelSpec
from lowtide.train.history import StepReport, TrainResult
from lowtide.train.observers import Cost, Quiet, Sample
from lowtide.train.rehearsal import Rehearsal, finished
from lowtide.train.resume import Resumption, settle
from lowtide.train.run import train
from lowtide.train.settings import TrainSettings

from .dry_run import say_rehearsal
from .live import LiveView
from .output import Output, count, duration, megabytes
from .summary import summary

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
    if progress.rehearsal is not None:
        output.result(finished(progress.rehearsal))
        return 0
    if result.steps:
        for line in summary(settings, result, progress.cost):
            output.say(line)
    else:
        output.say("interrupted before the first update; nothing was written")
    cost = {key: value for key, value in asdict(progress.cost).items() if key != "cpu_s"}
    output.result({**asdict(result), **cost, "adapter_path": settings.adapter_path})
    return 130 if result.interrupted else 0


class Progress(Quiet):
    """A live view on a terminal, a line every `steps_per_report` updates elsewhere."""

    def __init__(self, settings: TrainSettings, output: Output) -> None:
        """Nothing is drawn before the first step."""
        self._settings, self._output = settings, output
        self._view: LiveView | None = None
        self.cost = Cost(0.0, 0.0, 0.0, None)
        self._iters = 0
        self._wall, self._step = 0.0, 0
        self._first = 1
        self.rehearsal: Rehearsal | None = None
        """What `--dry-run` found."""
        self._recent: list[StepReport] = []

    def on_rehearsal(self, rehearsal: Rehearsal) -> None:
        """Show what was found."""
        self.rehearsal = rehearsal
        say_rehearsal(rehearsal, self._settings, self._output)

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
            f"model    {model.path} ({spec.model_type}, {count(spec.n_parameters)} "
            f"parameters, {'/'.join(model.stored_dtypes)} mapped from "
            f"{megabytes(model.checkpoint.nbytes)})"
        )
        self._output.say(
            f"adapter  {adapter.config.in_words()} on {', '.join(_short(adapter))}"
            f"{_layers(adapter, spec)}: {count(adapter.n_parameters)} parameters"
        )

    def on_data(self, report: PrepareReport) -> None:
        """Say what was read, cut and dropped."""
        for name, split in report.splits.items():
            self._output.say(f"{name:<8} {split.summary()}")

    def on_start(self, iters: int, budget_bytes: int | None) -> None:
        """Set up the view, where there is a terminal."""
        self._iters = iters
        if self._first > iters:
            self._output.say(f"all {iters} updates are made; --iters or --epochs goes on")
        if self._output.stream.isatty():
            self._view = LiveView(self._output, iters, budget_bytes)

    def on_step(self, report: StepReport) -> None:
        """Redraw the view, or print a line now and then."""
        self._wall += report.wall_s
        self._step = report.step
        if self._view is not None:
            self._view.on_step(report)
            return
        self._recent.append(report)
        made = report.step - self._first + 1
        left = (self._iters - report.step) * self._wall / made
        due = report.step % self._settings.steps_per_report == 0
        if due or report.step in (self._first, self._iters):
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
        """Tell the validation loss."""
        if self._view is not None:
            self._view.on_valid(step, result)
        else:
            self._output.say(
                f"step {step}/{self._iters}  validation loss {result.loss:.4f} "
                f"({result.n_tokens:,} tokens)"
            )

    def on_save(self, step: int) -> None:
        """Tell where the checkpoint went."""
        if self._view is not None:
            self._view.on_save(step)
        else:
            self._output.say(f"step {step}: saved to {self._settings.adapter_path}")

    def on_sample(self, sample: Sample) -> None:
        """Tell what was made of a prompt."""
        if self._view is not None:
            self._view.on_sample(sample)
        else:
            self._output.say(f"step {sample.step}: {sample.prompt!r} -> {sample.text!r}")

    def on_pause(self, reason: str | None) -> None:
        """Tell why the run pauses, and that it goes on."""
        if self._view is not None:
            self._view.on_pause(reason)
        else:
            told = f"paused after step {self._step}: {reason}" if reason else "going on"
            self._output.say(told)

    def on_stopping(self) -> None:
        """Tell that a signal was heard."""
        if self._view is not None:
            self._view.on_stopping()
        else:
            self._output.say("\nfinishing this update, then saving; once more stops at once")

    def on_end(self, result: TrainResult, cost: Cost) -> None:
        """Keep what it cost for the summary."""
        self.cost = cost

    def close(self) -> None:
        """Leave the view as it is and go on below it."""
        if self._view is not None:
            self._view.close()


def _layers(adapter: Adapter, spec: ModelSpec) -> str:
    """Which blocks are adapted, where not all are."""
    layers = adapter.config.layers(spec)
    if len(layers) == spec.num_layers:
        return ""
    return f" of {len(layers)} of {spec.num_layers} blocks (from {layers[0]} to {layers[-1]})"


def _short(adapter: Adapter) -> list[str]:
    return [module.split(".")[-1] for module in adapter.modules]
