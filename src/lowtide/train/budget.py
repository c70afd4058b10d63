"""`--memory-budget`: the fastest setting that fits, for the commands that make steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from lowtide.config import build, setting
from lowtide.errors import BudgetError, ConfigError
from lowtide.memory import measure
from lowtide.memory.available import available_bytes
from lowtide.memory.choice import candidates, choose, longest_that_fits
from lowtide.memory.measure import read_memory
from lowtide.memory.plan import Plan, Workload, predict
from lowtide.methods import MethodOptions
from lowtide.model.decoder import Decoder
from lowtide.sizes import size_in_bytes

from .settings import ModelSettings, StepSettings, check_step


@dataclass(frozen=True, kw_only=True)
class PlanSettings(StepSettings, ModelSettings):
    """Settings of `lowtide plan`."""

    max_seq_length: int = setting(512, help="tokens per sequence", minimum=2)
    batch_size: int = setting(1, help="sequences per forward and backward", minimum=1)
    accumulate: bool = setting(
        False,
        help="gradients of all parameters live at once, as with --grad-accumulation-steps, or with "
        "--max-grad-norm unless --clip-mode says otherwise",
    )


S = TypeVar("S", bound=StepSettings)


def budget_bytes(text: str) -> int:
    """A budget as a user writes it.

    Args:
        text: a size such as `400MB`, or a share of the free memory such as `50%`.

    Returns:
        Bytes.

    Raises:
        ConfigError: it is neither.
    """
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if share is None:
        try:
            return size_in_bytes("memory_budget", text)
        except ConfigError as error:
            raise ConfigError(f"{str(error)[:-1]}, or a share of the free memory: 50%.") from error
    percent = float(share[1])
    if not 0 < percent <= 100:
        raise ConfigError(f"memory_budget is {text!r}; expected more than 0% and at most 100%.")
    return int(available_bytes() * percent / 100)


def workload(
    settings: StepSettings, model: Decoder, lengths: Sequence[int], accumulates: bool
) -> Workload:
    """What the planner is asked.

    Args:
        settings: method, adapter and optimiser.
        model: for its shape and dtypes.
        lengths: tokens of each sequence of the largest batch.
        accumulates: whether the gradients of all parameters live at once.

    Returns:
        The question.
    """
    config = settings.lora_config(model.spec)
    return Workload(
        spec=model.spec,
        config=config,
        method=settings.method,
        optimizer=settings.optimizer,
        momentum=settings.momentum > 0,
        accumulates=accumulates,
        lengths=tuple(lengths),
        dtype=model.compute_dtype,
        widened=model.widens,
        reordered=model.reorders,
        state=settings.optimizer_state,
        rounded=settings.rounded_dtype is not None,
        storages=model.storages,
    )


def options_of(settings: MethodOptions) -> MethodOptions:
    """The method's options among the settings."""
    return MethodOptions(**{f.name: getattr(settings, f.name) for f in fields(MethodOptions)})


def within_budget(
    settings: S, model: Decoder, lengths: Sequence[int], *, accumulates: bool = False
) -> tuple[S, Guard | None]:
    """The settings as the planner chooses them.

    Args:
        settings: of the command.
        model: loaded.
        lengths: tokens of each sequence of the largest batch.
        accumulates: whether the gradients of all parameters live at once.

    Returns:
        The settings with the options that fit, and what keeps watch over the budget; unchanged
        and None where there is no budget.

    Raises:
        ConfigError: the budget is too small, is no size, is more than the memory that is free, or
            the method's memory cannot be planned.
    """
    if settings.memory_budget is None:
        return settings, None
    budget = budget_bytes(settings.memory_budget)
    work = workload(settings, model, lengths, accumulates)
    plan = choose(work, options_of(settings), budget)
    available = available_bytes()
    if plan.needed_bytes > available:
        raise ConfigError(
            f"--memory-budget {settings.memory_budget}: the setting that fits it needs "
            f"{plan.needed_bytes / 1e6:,.1f} MB, and {available / 1e6:,.1f} MB are free. "
            "Lower it, or close other programs."
        )
    return replace(settings, **asdict(plan.options)), Guard(work, plan.options, budget)


class Guard:
    """Keeps watch over a budget during a run: before each update, and after it."""

    def __init__(self, work: Workload, options: MethodOptions, budget_bytes: int) -> None:
        """Nothing is checked yet.

        Args:
            work: what the budget was planned for.
            options: as planned.
            budget_bytes: for `peak_anon_bytes`.
        """
        self._work, self._options = work, options
        self.budget_bytes = budget_bytes

    def admit(self, lengths: Sequence[int]) -> None:
        """Refuse a batch before anything is allocated for it.

        Args:
            lengths: tokens of each of its sequences.

        Raises:
            BudgetError: by its own lengths it needs more than the budget; or more than is held
                already and free now, of the machine or the control group.
        """
        plan = predict(replace(self._work, lengths=tuple(lengths)), self._options)
        batch = f"a batch of {sum(lengths):,} tokens, the longest sequence {max(lengths):,},"
        if plan.needed_bytes > self.budget_bytes:
            raise BudgetError(
                f"{batch} needs {plan.needed_bytes / 1e6:,.1f} MB, and the budget is "
                f"{self.budget_bytes / 1e6:,.1f} MB. Raise --memory-budget, or lower "
                "--max-seq-length or --batch-size."
            )
        held = max(0, read_memory().anon_bytes - measure.AT_IMPORT.anon_bytes)
        free = available_bytes()
        if plan.needed_bytes - held > free:
            raise BudgetError(
                f"{batch} needs {plan.needed_bytes / 1e6:,.1f} MB, of which "
                f"{held / 1e6:,.1f} MB are held already, and {free / 1e6:,.1f} MB are free now. "
                "Close other programs, or lower --memory-budget."
            )

    def check(self, peak_anon_bytes: int) -> None:
        """Refuse to go on after an update that took more than was predicted and allowed.

        Args:
            peak_anon_bytes: of the update.

        Raises:
            BudgetError: it was above the budget.
        """
        if peak_anon_bytes > self.budget_bytes:
            raise BudgetError(
                f"the update took {peak_anon_bytes / 1e6:,.1f} MB, more than the budget of "
                f"{self.budget_bytes / 1e6:,.1f} MB. Raise --memory-budget, or lower "
                "--max-seq-length."
            )


def plan(settings: PlanSettings | None = None, **given: Any) -> Plan:
    """What a run will need, before it runs: what `lowtide plan` prints.

    Args:
        settings: all settings; or give them as keywords instead.
        **given: settings by name, such as `model=`, `max_seq_length=`, `memory_budget=`.

    Returns:
        The setting that a run would take, with `predicted_peak_bytes` and `by_kind`.

    Raises:
        ConfigError: a setting is wrong, or the budget is too small.
        ModelError: the model cannot be used.
    """
    from .run import open_model  # which imports this module for its budget

    settings = build(PlanSettings, given if settings is None else asdict(settings))
    return Question(settings, open_model(settings)).plan()


class Question:
    """A plan's settings with their model."""

    def __init__(self, settings: PlanSettings, model: Decoder) -> None:
        """Check the options; nothing is planned yet.

        Args:
            settings: of the plan.
            model: opened with them.

        Raises:
            ConfigError: an option does not belong to the method.
        """
        check_step(settings)
        lengths = (settings.max_seq_length,) * settings.batch_size
        self.work = workload(settings, model, lengths, settings.accumulate)
        self.options = options_of(settings)
        text = settings.memory_budget
        self.budget = None if text is None else budget_bytes(text)

    def plan(self) -> Plan:
        """What a run would take: the fastest that fits, or without a budget what was asked for."""
        if self.budget is None:
            return predict(self.work, self.options)
        return choose(self.work, self.options, self.budget)

    def alternatives(self) -> list[Plan]:
        """Settings from the fastest to the smallest, some of the kept blocks left out."""
        plans = list(candidates(self.work, self.options))
        kept = [plan for plan in plans if plan.options.keep_blocks]
        return [*kept[:: max(1, len(kept) // 3)], *(plan for plan in plans if plan not in kept)]

    def longest(self) -> int | None:
        """Tokens of the longest sequence that the budget allows; None without a budget."""
        if self.budget is None:
            return None
        return longest_that_fits(self.work, self.options, self.budget)
