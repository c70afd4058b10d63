"""The settings of commands that train or measure, declared once (see `lowtide.config`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lowtide.config import setting
from lowtide.errors import ConfigError
from lowtide.methods import METHODS, MethodOptions, check_options
from lowtide.model.decoder import COMPUTE_DTYPES
from lowtide.weights.storages import STORAGES

from .looking import MannerSettings, SampleSettings, TrackerSettings
from .lora_settings import LoraSettings
from .recipe import MAX_BATCH, OptimizerSettings, RecipeSettings, check_optimizer

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model, and how it computes."""

    model: str = setting(
        help="model directory, GGUF file, or Hugging Face hub id", filled=True, changeable=True
    )
    compute_dtype: str | None = setting(
        None,
        help="dtype of activations and products; none chooses (`lowtide info` says why)",
        choices=tuple(COMPUTE_DTYPES),
    )
    quantize: str | None = setting(
        None,
        help="quantise the frozen weights, once, into ~/.cache/lowtide/quantized; none takes them "
        "as they are stored",
        choices=tuple(STORAGES),
    )
    threads: int | None = setting(
        None,
        help="CPU threads; none takes one for tiny models, else the cores",
        minimum=1,
        maximum=1024,
        changeable=True,
    )
    resident_weights: str | None = setting(
        None,
        help="most mapped weights in memory at once, such as 400MB; none keeps all, or as many as "
        "a machine or control group with less memory has room for",
        filled=True,
        changeable=True,
        metavar="SIZE",
    )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """How text becomes tokens and labels."""

    tokenizer: str | None = setting(
        None,
        help="directory with tokenizer.json, where the model's own is not to be used",
        filled=True,
        changeable=True,
    )
    max_seq_length: int = setting(
        512, help="tokens per sequence; longer ones are cut, and reported", minimum=2
    )
    mask_prompt: bool = setting(
        False, help="learn completions only: in chats, every assistant turn"
    )
    chat_template: str | None = setting(
        None,
        help="Jinja file to use instead of the tokenizer's chat template, or 'none'",
        filled=True,
    )
    cache_dir: str | None = setting(
        None,
        help="directory for tokenised data, which the next run with the same data and settings "
        "finds there; none takes ~/.cache/lowtide/tokens",
        changeable=True,
        filled=True,
        metavar="DIR",
    )
    cache_limit: str = setting(
        "20GB",
        help="most that is kept there: beyond it, what was not used for longest is removed",
        filled=True,
        changeable=True,
        metavar="SIZE",
    )
    prompt_feature: str = setting("prompt", help="record key of the prompt")
    completion_feature: str = setting("completion", help="record key of the completion")
    text_feature: str = setting("text", help="record key of plain text")
    chat_feature: str = setting("messages", help="record key of a chat's messages")

    def tokenizer_directory(self, model_directory: Path) -> Path:
        """Where the tokenizer is: the model's own unless another was named."""
        return Path(self.tokenizer).expanduser() if self.tokenizer else model_directory


@dataclass(frozen=True, kw_only=True)
class StepSettings(MethodOptions, OptimizerSettings, LoraSettings):
    """What decides the memory of a step, the model and the batch aside."""

    method: str = setting("mesp", help="how gradients are computed", choices=tuple(METHODS))
    adapter_dtype: str = setting(
        "float32",
        help="dtype of the adapter: float32 is the compute dtype; bfloat16, lossy, computes with "
        "rounded A and B and saves them so, while the optimiser keeps what rounding took away",
        choices=("float32", "bfloat16"),
    )
    memory_budget: str | None = setting(
        None,
        help="keep peak_anon_bytes within a size such as 400MB, or a share of the free memory such "
        "as 50%, by the fastest setting that fits (see `lowtide plan`)",
        filled=True,
        changeable=True,
        metavar="SIZE",
    )

    @property
    def rounded_dtype(self) -> torch.dtype | None:
        """The adapter's dtype where it is not the compute dtype."""
        return torch.bfloat16 if self.adapter_dtype == "bfloat16" else None


def check_step(settings: StepSettings) -> None:
    """Refuse what the method or the optimiser would ignore.

    Args:
        settings: of a command that makes steps.

    Raises:
        ConfigError: names the setting.
    """
    check_options(settings.method, settings)
    check_optimizer(settings)
    if settings.use_dora and settings.rounded_dtype is not None:
        raise ConfigError(
            "--use-dora with --adapter-dtype bfloat16: magnitudes rounded to 8 bits would change "
            "every row of the weights by up to 0.4%. Leave --adapter-dtype out."
        )


# Dataclass fields come in reverse order of the bases, which is thus the order of run.yaml.
@dataclass(frozen=True, kw_only=True)
class TrainSettings(
    RecipeSettings,
    StepSettings,
    DataSettings,
    MannerSettings,
    TrackerSettings,
    SampleSettings,
    ModelSettings,
):
    """All settings of `lowtide train`."""

    data: str = setting(
        help=".jsonl, .json or .txt file, or a directory with {train,valid,test}.jsonl",
        filled=True,
        changeable=True,
    )
    adapter_path: str = setting(
        help="directory to write the adapter to", filled=True, changeable=True
    )
    overwrite: bool = setting(False, help="replace the run that --adapter-path already holds")
    dry_run: bool = setting(
        False,
        help="check everything, show a sample with its masks, plan the memory, make one update, "
        "and write nothing",
    )
    batch_size: int = setting(
        1, help="sequences per forward and backward", minimum=1, maximum=MAX_BATCH
    )
    packing: bool = setting(
        False,
        help="fill every batch with whole records, up to batch size x max seq length tokens, so "
        "that all updates take about as long; attention never reaches from one record to another",
    )
    group_by_length: bool = setting(
        False, help="let records of similar length share a batch (with --batch-size above 1)"
    )
    seed: int = setting(
        0, help="seed of initialisation, order, dropout and noise", minimum=0, maximum=MAX_SEED
    )
    deterministic: bool = setting(
        False,
        help="the same bytes on any number of cores: one thread unless --threads says how many, "
        "torch's own products, and --resume only with the same arithmetic",
    )
    neftune_noise_alpha: float | None = setting(
        None,
        help="NEFTune: uniform noise on the embeddings in training; usual are 5 to 15",
        above=0,
    )
    valid_data: str | None = setting(None, help="file to validate on", filled=True, changeable=True)
    valid_records: int = setting(
        0, help="hold out the last N records (.txt: windows) of --data for validation", minimum=0
    )
    val_batches: int = setting(
        25, help="batches per validation; 0 uses the whole validation set", minimum=0
    )
    steps_per_report: int = setting(
        10, help="updates between lines of progress", minimum=1, changeable=True
    )
    steps_per_eval: int = setting(
        200, help="updates between validations", minimum=1, changeable=True
    )
    save_every: int = setting(100, help="updates between checkpoints", minimum=1, changeable=True)
    save_minutes: float | None = setting(
        None, help="minutes after which a checkpoint is due in any case", above=0, changeable=True
    )
    keep_checkpoints: int = setting(
        2, help="checkpoints that are kept, the newest ones", minimum=1, changeable=True
    )
    resume: bool = setting(
        False,
        help="go on with the run in --adapter-path, from its newest checkpoint; what is not given "
        "stays as it was",
    )
    resume_anyway: bool = setting(
        False, help="with --resume: though model, data or lowtide's version is another than before"
    )
