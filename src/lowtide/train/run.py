"""A whole run: check everything, tokenise in a child, train, save."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lowtide.caches import cache_root
from lowtide.config import build
from lowtide.data.cache import TokenDataset
from lowtide.data.formats import FeatureNames
from lowtide.data.prepare import PrepareRequest, prepare
from lowtide.device import lower_priority
from lowtide.errors import ConfigError, DataError
from lowtide.methods import get_method
from lowtide.model.adapter import Adapter
from lowtide.model.decoder import Decoder, load_model
from lowtide.model.kept import check_kept
from lowtide.model.threads import set_threads
from lowtide.sizes import size_in_bytes

from .budget import within_budget
from .determinism import pinned
from .fingerprint import arithmetic, model_fingerprint
from .groups import Groups
from .history import TrainResult
from .looking import check_manners, check_samples, with_prompts
from .loop import Trainer
from .observers import Quiet, RunObserver
from .optim import OPTIMIZERS
from .order import batches_of_epochs, check_batches, largest_batch
from .output import check_output, check_space, made_directory
from .recipe import check_recipe
from .rehearsal import has_validation, rehearse
from .resume import check_arithmetic, check_same, find, settle
from .run_dir import Identity, RunDir
from .schedule import Schedule, updates_of
from .settings import DataSettings, ModelSettings, TrainSettings, check_step
from .stop import Stop
from .stopping import check_stopping
from .trackers import wanted_trackers
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
    settings = settle(given) if settings is None else build(TrainSettings, asdict(settings))
    observer = observer or Quiet()
    settings = with_prompts(settings)
    check_supported(settings)
    settings = pinned(settings)
    directory = Path(settings.adapter_path).expanduser()
    check_output(directory, settings.overwrite or settings.resume)
    if settings.dry_run:
        return _rehearse(directory, settings, observer)
    if settings.nice is not None:
        lower_priority(settings.nice)
    stop = Stop(observer.on_stopping)
    with stop.listening(), made_directory(directory):
        check_output(directory, settings.overwrite or settings.resume)  # nobody else writes now
        return _train_in(directory, settings, observer, stop)


def _train_in(
    directory: Path, settings: TrainSettings, observer: RunObserver, stop: Stop
) -> TrainResult:
    resumed = find(directory, settings) if settings.resume else None
    model = open_model(settings)
    check_length(model, settings.max_seq_length)
    adapter = _new_adapter(directory, settings, model)
    fingerprints: dict[str, str | None] = {"model": model_fingerprint(model)}
    if resumed is not None:
        check_same(resumed, settings, fingerprints)
        observer.on_resume(resumed)
    observer.on_model(model, adapter)
    report = prepare(_request(settings, model))
    observer.on_data(report)
    train_set = TokenDataset.open(report.splits["train"].path)
    valid = report.splits.get("valid")
    valid_set = None if valid is None else TokenDataset.open(valid.path)
    fingerprints["train"] = report.splits["train"].sha256
    fingerprints["valid"] = None if valid is None else valid.sha256
    iters = updates_of(settings, batches_of_epochs(settings, train_set))
    check_stopping(settings, iters, valid_set is not None)
    if resumed is not None:
        check_same(resumed, settings, fingerprints)
        resumed.check_iters(iters)
    fitting, guard = within_budget(
        settings,
        model,
        largest_batch(settings, train_set, valid_set),
        accumulates=settings.accumulates,
    )
    method = get_method(settings.method, fitting)
    identity = Identity(settings, fingerprints, arithmetic(fitting.tiles))
    trainer = Trainer(model, adapter, method, replace(settings, iters=iters), guard, stop)
    found = None
    if resumed is not None:
        check_arithmetic(resumed, settings, identity.arithmetic)
        found = resumed.checkpoint
        trainer.resume(found)
    observer.on_start(iters, None if guard is None else guard.budget_bytes)
    with closing(RunDir(directory, identity, found)) as run_dir:
        with watched(run_dir, trainer, report, observer) as watchers:
            result = trainer.run(train_set, valid_set, run_dir, watchers)
            watchers.end(result)
            return result


def _rehearse(directory: Path, settings: TrainSettings, observer: RunObserver) -> TrainResult:
    """All that a run checks, and one update; the result counts none."""
    check_stopping(settings, settings.iters or sys.maxsize, has_validation(settings))
    model = open_model(settings)
    check_length(model, settings.max_seq_length)
    adapter = _new_adapter(directory, settings, model)
    observer.on_model(model, adapter)
    rehearsal = rehearse(settings, model, adapter, _request(settings, model))
    observer.on_rehearsal(rehearsal)
    step = rehearsal.step
    return TrainResult(
        0, step.loss, None, step.n_tokens, step.wall_s, step.cpu_s, step.peak_anon_bytes,
        step.peak_rss_bytes,
    )  # fmt: skip


def _new_adapter(directory: Path, settings: TrainSettings, model: Decoder) -> Adapter:
    """An untrained adapter, when all that depends on its shape has been checked."""
    config = settings.lora_config(model.spec)
    check_kept(settings.keep_blocks, model.spec, config)
    adapter = Adapter.create(model, config, settings.seed, settings.rounded_dtype)
    check_space(directory, _checkpoint_bytes(settings, adapter), settings.keep_checkpoints)
    Groups(settings, adapter.parameters)  # refuses names that no parameter has
    return adapter


def _checkpoint_bytes(settings: TrainSettings, adapter: Adapter) -> int:
    """The size of a checkpoint's tensors: the adapter's and what its optimiser will keep."""
    optimizer = OPTIMIZERS[settings.optimizer](settings, adapter.parameters)
    tensors = [*adapter.parameters.values(), *optimizer.state().values()]
    return sum(tensor.nbytes for tensor in tensors)


def check_supported(settings: TrainSettings) -> None:
    """Refuse what is declared and not there yet, and combinations that mean nothing.

    Args:
        settings: of the whole run.

    Raises:
        ConfigError: names the setting.
    """
    if settings.resume and settings.overwrite:
        raise ConfigError("--resume goes on with a run, --overwrite replaces it; give one of them.")
    if settings.dry_run and settings.resume:
        raise ConfigError("--dry-run tries a new run, --resume goes on with one; give one of them.")
    if settings.resume_anyway and not settings.resume:
        raise ConfigError("--resume-anyway is for --resume, which is not given.")
    check_step(settings)
    check_batches(settings)
    check_recipe(settings, settings.learning_rate)
    check_samples(settings)
    check_manners(settings)
    wanted_trackers(settings.report_to)
    size_in_bytes("cache_limit", settings.cache_limit)
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


def data_request(settings: DataSettings, model: Decoder, data: str, **more: Any) -> PrepareRequest:
    """What the tokenising child is asked to do."""
    cache = settings.cache_dir
    return PrepareRequest(
        data=Path(data).expanduser(),
        tokenizer=settings.tokenizer_directory(model.directory),
        cache=Path(cache).expanduser() if cache else cache_root() / "tokens",
        cache_bytes=size_in_bytes("cache_limit", settings.cache_limit),
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


def _request(settings: TrainSettings, model: Decoder) -> PrepareRequest:
    valid = settings.valid_data
    return data_request(
        settings,
        model,
        settings.data,
        valid_data=None if valid is None else Path(valid).expanduser(),
        valid_records=settings.valid_records,
    )
