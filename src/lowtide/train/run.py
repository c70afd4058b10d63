"""A whole run: check everything, tokenise in a child, train, save."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

from lowtide.config import build
from lowtide.data.cache import TokenDataset
from lowtide.data.formats import FeatureNames
from lowtide.data.prepare import PrepareRequest, prepare
from lowtide.errors import ConfigError, DataError
from lowtide.methods import get_method
from lowtide.model.adapter import Adapter
from lowtide.model.decoder import Decoder, load_model
from lowtide.model.threads import set_threads

from .budget import within_budget
from .groups import Groups
from .loop import Trainer, TrainResult
from .observers import Quiet, RunObserver
from .order import batches_in_pass, check_batches, largest_batch
from .recipe import check_recipe
from .run_dir import RunDir, check_output, check_space, made_directory
from .schedule import Schedule, updates_of
from .settings import DataSettings, ModelSettings, TrainSettings, check_step
from .watch import watched


def train(
    settings: TrainSettings | None = None, *, observer: RunObserver | None = None, **given: Any
) -> TrainResult:
    """Fine-tune an adapter and save it in PEFT's format: what `lowtide train` does.

    Args:
        settings: all settings; or give them as keywords instead.
        observer: told of progress; silent when None.
        **given: settings by name, such as `model=`, `data=`, `adapter_path=`.

    Returns:
        What the run did. The adapter is in `adapter_path`.

    Raises:
        ConfigError: a setting is unknown, missing or out of range.
        ModelError: the model cannot be used.
        DataError: the data cannot be used.
        OutputError: the output directory cannot be used, or the disk is full.
        TrainingError: a loss was not finite; the last good adapter is on disk.
    """
    if settings is not None and given:
        raise ConfigError(f"give settings or keywords, not both ({', '.join(given)}).")
    settings = build(TrainSettings, given if settings is None else asdict(settings))
    observer = observer or Quiet()
    check_supported(settings)
    directory = Path(settings.adapter_path).expanduser()
    check_output(directory, settings.overwrite)
    model = open_model(settings)
    check_length(model, settings.max_seq_length)
    adapter = Adapter.create(model, settings.lora_config(), settings.seed, settings.rounded_dtype)
    check_space(directory, adapter)
    Groups(settings, adapter.parameters)  # refuses names that no parameter has
    observer.on_model(model, adapter)
    with made_directory(directory) as caches:
        report = prepare(_request(settings, model, caches))
        observer.on_data(report)
        train_set = TokenDataset.open(report.splits["train"].path)
        valid = report.splits.get("valid")
        valid_set = None if valid is None else TokenDataset.open(valid.path)
        if valid_set is None and settings.early_stopping_patience is not None:
            raise ConfigError(
                "--early-stopping-patience counts validations, and there is no validation data. "
                "Give --valid-data or --valid-records."
            )
        fitting, guard = within_budget(
            settings,
            model,
            largest_batch(settings, train_set, valid_set),
            accumulates=settings.accumulates,
        )
        method = get_method(settings.method, fitting)
        iters = updates_of(settings, batches_in_pass(settings, train_set))
        trainer = Trainer(model, adapter, method, replace(settings, iters=iters), guard)
        observer.on_start(iters)
        with closing(RunDir(directory, settings, settings.model)) as run_dir:
            with watched(run_dir, trainer, report, observer) as watchers:
                with _finish_update_on_interrupt(trainer, watchers):
                    result = trainer.run(train_set, valid_set, run_dir, watchers)
                watchers.end(result)
                return result


def check_supported(settings: TrainSettings) -> None:
    """Refuse what is declared and not there yet, and combinations that mean nothing.

    Args:
        settings: of the whole run.

    Raises:
        ConfigError: names the setting.
    """
    if settings.resume:
        raise ConfigError(
            "--resume is not supported yet. Start a new run in another --adapter-path, or replace "
            "this one with --overwrite."
        )
    check_step(settings)
    check_batches(settings)
    check_recipe(settings, settings.learning_rate)
    if settings.epochs is None:
        Schedule.of(settings, updates_of(settings, 0))  # refuses a warm-up that is too long
    if settings.valid_data is not None and settings.valid_records:
        raise ConfigError("give --valid-data or --valid-records, not both.")


def open_model(settings: ModelSettings) -> Decoder:
    """The model of the settings, with the number of threads applied."""
    model = load_model(
        settings.model, settings.compute_dtype, settings.quantize, settings.resident_weights
    )
    set_threads(model.spec, settings.threads)
    return model


def check_length(model: Decoder, max_seq_length: int) -> None:
    """Refuse sequences that the model has no positions for.

    Args:
        model: for its positions.
        max_seq_length: the setting.

    Raises:
        DataError: says both numbers.
    """
    if max_seq_length > model.spec.max_positions:
        raise DataError(
            f"--max-seq-length {max_seq_length} is more than the model's "
            f"{model.spec.max_positions} positions (max_position_embeddings in config.json). Use "
            f"--max-seq-length {model.spec.max_positions} or less."
        )


def data_request(
    settings: DataSettings, model: Decoder, data: str, out: Path, **more: Any
) -> PrepareRequest:
    """What the tokenising child is asked to do."""
    tokenizer = Path(settings.tokenizer).expanduser() if settings.tokenizer else model.directory
    return PrepareRequest(
        data=Path(data).expanduser(),
        tokenizer=tokenizer,
        out=out,
        max_seq_length=settings.max_seq_length,
        vocab_size=model.spec.vocab_size,
        mask_prompt=settings.mask_prompt,
        chat_template=settings.chat_template,
        features=FeatureNames(
            prompt=settings.prompt_feature,
            completion=settings.completion_feature,
            text=settings.text_feature,
            chat=settings.chat_feature,
        ),
        **more,
    )


def _request(settings: TrainSettings, model: Decoder, out: Path) -> PrepareRequest:
    valid = settings.valid_data
    return data_request(
        settings,
        model,
        settings.data,
        out,
        valid_data=None if valid is None else Path(valid).expanduser(),
        valid_records=settings.valid_records,
    )


@contextmanager
def _finish_update_on_interrupt(trainer: Trainer, observer: RunObserver) -> Iterator[None]:
    """The first Ctrl-C ends the run after the update being made, the second at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        if not trainer.request_stop():
            raise KeyboardInterrupt
        observer.on_stopping()

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
