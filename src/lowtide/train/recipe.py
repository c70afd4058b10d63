"""The settings of a recipe: optimiser, rates, clipping, length of the run, when to stop it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from lowtide.config import flag, setting
from lowtide.errors import ConfigError, listed

from .optim import OPTIMIZERS
from .schedule import SCHEDULES
from .states import STATES

MAX_BATCH = 65_536
_STATE_8BIT = "--optimizer-state 8bit"
_OPTIMIZERS_ELSEWHERE = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "paged_adamw"), "adamw"),
    **dict.fromkeys(
        ("adamw8bit", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adam8bit"),
        f"adamw with {_STATE_8BIT}",
    ),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit"), "lion"),
    **dict.fromkeys(("lion8bit", "lion_8bit", "paged_lion_8bit"), f"lion with {_STATE_8BIT}"),
}
_SCHEDULES_ELSEWHERE = {
    "constant_with_warmup": "constant with --warmup-steps",
    "linear_decay": "linear",
    "cosine_decay": "cosine",
    "cosine_with_min_lr": "cosine with --min-lr",
    "inverse-sqrt": "inverse_sqrt",
}
CLIP_MODES = ("accumulate", "two-pass", "per-parameter")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """What turns gradients into updates."""

    optimizer: str = setting(
        "adamw", help="optimiser", choices=tuple(OPTIMIZERS), elsewhere=_OPTIMIZERS_ELSEWHERE
    )
    learning_rate: float = setting(
        1e-4,
        help="step size: the highest of the schedule",
        above=0,
        maximum=1e30,
        changeable=True,
    )
    weight_decay: float = setting(
        0.0,
        help="L2 term of sgd, decoupled decay (times the learning rate) of the others",
        minimum=0,
    )
    weight_decay_on: str = setting(
        "all",
        help="which parameters decay: 'all', or parts of their names separated by commas, such as "
        "lora_B or q_proj,v_proj.lora_A",
        listed=True,
        filled=True,
    )
    loraplus_lr_ratio: float = setting(
        1.0, help="LoRA+: B's learning rate is this many times A's", above=0, maximum=1e6
    )
    momentum: float = setting(0.0, help="momentum of sgd", minimum=0, maximum=0.9999)
    beta1: float = setting(
        0.9, help="first decay rate of adamw and lion", minimum=0, maximum=0.9999
    )
    beta2: float | None = setting(
        None,
        help="second decay rate; none takes 0.999 for adamw, 0.99 for lion",
        minimum=0,
        maximum=0.999999,
    )
    adam_eps: float = setting(1e-8, help="epsilon of adamw", above=0)
    adafactor_relative: bool = setting(
        False,
        help="adafactor: steps relative to the size of each parameter, and at most 1/sqrt(step); "
        "no takes the learning rate as it is",
    )
    optimizer_state: str = setting(
        "float32",
        help="how the moments of adamw, lion and sgd with momentum are kept: 4 bytes per adapter "
        "parameter and moment (8 with --compute-dtype float64), or, lossy, 2 (bfloat16) or 1.02 "
        "(8bit)",
        choices=tuple(STATES),
    )


@dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """How long to train, at what rate, and when to stop."""

    iters: int | None = setting(
        None,
        help="optimiser updates; none takes 100 where --epochs is not given",
        minimum=1,
        changeable=True,
    )
    epochs: float | None = setting(
        None,
        help="passes over the training data, instead of --iters",
        above=0,
        maximum=1e6,
        changeable=True,
    )
    lr_schedule: str = setting(
        "constant",
        help="how the learning rate changes after the warm-up",
        choices=tuple(SCHEDULES),
        elsewhere=_SCHEDULES_ELSEWHERE,
    )
    warmup_steps: int = setting(
        0, help="updates over which the learning rate rises from 0", minimum=0
    )
    warmup_ratio: float = setting(
        0.0, help="the same as a share of all updates", minimum=0, maximum=0.99
    )
    min_lr: float = setting(
        0.0, help="learning rate at which linear and cosine schedules end", minimum=0
    )
    grad_accumulation_steps: int = setting(
        1,
        help="batches per update, weighted by their labelled tokens",
        minimum=1,
        maximum=MAX_BATCH,
    )
    max_grad_norm: float | None = setting(
        None, help="clip gradients to this norm, in the way of --clip-mode", above=0
    )
    clip_mode: str = setting(
        "accumulate",
        help="accumulate: the global norm, with all gradients at once (4 bytes per adapter "
        "parameter); two-pass: the global norm, from a backward of its own (no memory, twice the "
        "time); per-parameter: the norm of each matrix by itself (no memory, no time)",
        choices=CLIP_MODES,
    )
    early_stopping_patience: int | None = setting(
        None,
        help="stop after this many validations in a row without improvement",
        minimum=1,
        changeable=True,
    )
    early_stopping_min_delta: float = setting(
        0.0,
        help="least fall of the validation loss that is an improvement",
        minimum=0,
        changeable=True,
    )

    @property
    def accumulates(self) -> bool:
        """Whether an update needs the gradients of all parameters at once."""
        clips_at_end = self.max_grad_norm is not None and self.clip_mode == "accumulate"
        return self.grad_accumulation_steps > 1 or clips_at_end


OPTIONS_OF: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum", "optimizer_state"),
    "adamw": ("beta1", "beta2", "adam_eps", "optimizer_state"),
    "lion": ("beta1", "beta2", "optimizer_state"),
    "adafactor": ("adafactor_relative",),
}
"""Which settings each optimiser reads, beside rates and weight decay."""


def check_optimizer(settings: OptimizerSettings) -> None:
    """Refuse what the optimiser would ignore.

    Args:
        settings: of a command that makes steps.

    Raises:
        ConfigError: names every such setting.
    """
    problems = list(_optimizer_problems(settings))
    if problems:
        raise ConfigError(f"the settings cannot be used:\n{listed(problems)}")


def _optimizer_problems(settings: OptimizerSettings) -> Iterator[str]:
    own = OPTIONS_OF[settings.optimizer]
    for option in fields(OptimizerSettings):
        name = option.name
        changed = getattr(settings, name) != option.default
        owners = [of for of, theirs in OPTIONS_OF.items() if name in theirs]
        if changed and owners and name not in own:
            yield f"{flag(name)} belongs to {' and '.join(owners)}, not to {settings.optimizer}"
    if settings.optimizer == "sgd" and not settings.momentum:
        if settings.optimizer_state != "float32":
            yield (
                f"--optimizer-state {settings.optimizer_state} is for adamw, lion, and sgd with "
                "--momentum; sgd without it keeps no state. Leave it out."
            )
    if settings.weight_decay_on != "all" and not settings.weight_decay:
        yield "--weight-decay-on says what decays, and --weight-decay is 0. Give both or neither."


def check_recipe(settings: RecipeSettings, learning_rate: float) -> None:
    """Refuse settings that exclude each other, and those that would be ignored.

    Args:
        settings: of the run.
        learning_rate: the highest.

    Raises:
        ConfigError: names every such setting.
    """
    problems = [*_schedule_problems(settings, learning_rate), *_other_problems(settings)]
    if problems:
        raise ConfigError(f"the settings cannot be used:\n{listed(problems)}")


def _schedule_problems(settings: RecipeSettings, learning_rate: float) -> Iterator[str]:
    if settings.iters is not None and settings.epochs is not None:
        yield "--iters and --epochs both say how long to train. Give one of them."
    if settings.warmup_steps and settings.warmup_ratio:
        yield "--warmup-steps and --warmup-ratio both say how long to warm up. Give one of them."
    if settings.min_lr and settings.lr_schedule not in ("linear", "cosine"):
        yield (
            f"--min-lr is where linear and cosine schedules end; --lr-schedule "
            f"{settings.lr_schedule} has no use for it. Leave it out, or choose one of those."
        )
    elif settings.min_lr >= learning_rate:
        yield (
            f"--min-lr {settings.min_lr:g} is not below --learning-rate {learning_rate:g}, from "
            "which the schedule falls. Lower it."
        )


def _other_problems(settings: RecipeSettings) -> Iterator[str]:
    clips, accumulates = settings.max_grad_norm is not None, settings.grad_accumulation_steps > 1
    if settings.clip_mode != "accumulate" and not clips:
        yield (
            f"--clip-mode {settings.clip_mode} says how to clip, and --max-grad-norm is not given. "
            "Give both or neither."
        )
    if settings.clip_mode == "two-pass" and accumulates:
        yield (
            "--clip-mode two-pass applies gradients in the backward, and "
            f"--grad-accumulation-steps {settings.grad_accumulation_steps} sums them first, which "
            "gives their norm in one pass. Use --clip-mode accumulate."
        )
    if settings.early_stopping_min_delta and settings.early_stopping_patience is None:
        yield (
            "--early-stopping-min-delta is of no use without --early-stopping-patience. Give both "
            "or neither."
        )
