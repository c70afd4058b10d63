"""`lowtide bench paper`: the paper's tables and plots as cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.config import did_you_mean, setting
from lowtide.errors import ConfigError

from .case import Case, Run, Runner, Summary, command_kind
from .convergence import CONVERGENCE_METHODS, convergence_settings, run_convergence
from .peers import peer_cases, run_peer
from .results import GROUPS, file_name, label
from .shapes import ShapeSettings

MODELS = {"0.5b": "qwen2.5-0.5b", "1.5b": "qwen2.5-1.5b", "3b": "qwen2.5-3b"}
QUICK_SHAPE = "smollm2-135m"
METHODS: tuple[dict[str, Any], ...] = (
    {"method": "mesp"},
    {"method": "mebp", "mebp_loss": "sweep"},
    {"method": "mebp", "mebp_loss": "full"},
    {"method": "mezo"},
)
_EXACT = (METHODS[0], METHODS[2])


@dataclass(frozen=True, kw_only=True)
class PaperSettings(ShapeSettings):
    """Settings of `lowtide bench paper`."""

    out: str = setting(
        help="directory for the results; a run goes on where it stopped", filled=True
    )
    models: str = setting(
        ",".join(MODELS),
        help=f"which of {', '.join(MODELS)}, separated by commas; sweeps take the smallest, and "
        "without 0.5b only --only asks for them",
        listed=True,
    )
    quick: bool = setting(
        False, help=f"five minutes on two cores: {QUICK_SHAPE}, short sequences, one step"
    )
    only: str | None = setting(
        None, help=f"groups, separated by commas: {', '.join(GROUPS)}", listed=True, filled=True
    )
    steps: int | None = setting(
        None,
        help="measured steps of a round, after the one that warms up; none is 2, or 1 if --quick",
        minimum=1,
    )
    rounds: int | None = setting(
        None,
        help="how often each step is measured, in fresh processes that take turns, so that a "
        "machine that slows down slows all alike; none is 3, or 1 if --quick",
        minimum=1,
    )


@dataclass(frozen=True)
class Plan:
    """The sizes of a run."""

    shapes: tuple[str, ...]
    seq_len: int
    lengths: tuple[int, ...]
    ranks: tuple[int, ...]
    directions: str
    quality_seq_len: int
    iters: int
    steps: int
    rounds: int

    @property
    def small(self) -> str:
        """The shape of the sweeps."""
        return self.shapes[0]


KINDS: dict[str, Run] = {
    "step": command_kind("bench", "step"),
    "timeline": command_kind("bench", "timeline"),
    "quality": command_kind("bench", "quality"),
    "convergence": run_convergence,
    "peer": run_peer,
}
"""How each kind of case is measured."""


def bench_paper(settings: PaperSettings, say: Callable[[str], None]) -> Summary:
    """Run the cases of the paper that are not there yet.

    Args:
        settings: of the command.
        say: told of progress.

    Returns:
        How each case ended.

    Raises:
        ConfigError: a model or a group is unknown.
        OutputError: the directory cannot be written.
    """
    cases = paper_cases(settings)
    directory = Path(settings.out).expanduser()
    return Runner(directory, KINDS, say, settings.cache_dir).run(cases)


def paper_cases(settings: PaperSettings) -> list[Case]:
    """All cases of the settings, small models first.

    Args:
        settings: of the command.

    Returns:
        The cases, in the order in which they are measured.

    Raises:
        ConfigError: a model or a group is unknown.
    """
    plan = plan_of(settings)
    cases = [case for group in groups_of(settings, plan) for case in _BUILDERS[group](plan)]
    sizes = {shape: size for size, shape in enumerate(plan.shapes)}
    return sorted(cases, key=lambda case: sizes.get(case.settings["shape"], 0))


def plan_of(settings: PaperSettings) -> Plan:
    """The sizes that the settings ask for."""
    if settings.quick:
        if settings.models != PaperSettings.models:
            raise ConfigError(f"--quick measures {QUICK_SHAPE}; leave out --models or --quick.")
        return Plan(
            shapes=(QUICK_SHAPE,),
            seq_len=128,
            lengths=(64, 128),
            ranks=(4, 16),
            directions="1,4,16",
            quality_seq_len=16,
            iters=30,
            steps=settings.steps or 1,
            rounds=settings.rounds or 1,
        )
    names = _chosen("models", settings.models, tuple(MODELS))
    return Plan(
        shapes=tuple(MODELS[name] for name in names),
        seq_len=256,
        lengths=(128, 256, 512, 1024),
        ranks=(4, 8, 16, 32),
        directions="1,4,16,64",
        quality_seq_len=64,
        iters=180,
        steps=settings.steps or 2,
        rounds=settings.rounds or 3,
    )


def groups_of(settings: PaperSettings, plan: Plan) -> list[str]:
    """The groups to measure: those named, else all; without the smallest model no sweeps."""
    if settings.only is not None:
        return _chosen("only", settings.only, GROUPS)
    if plan.small in (QUICK_SHAPE, MODELS["0.5b"]):
        return list(GROUPS)
    return ["models", "store_h"]


def _chosen(name: str, text: str, known: Sequence[str]) -> list[str]:
    """The known words of a list, in the order in which they are known."""
    words = [word.strip().lower() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in known:
            raise ConfigError(
                f"--{name}: there is no {word!r}{did_you_mean(word, known)}. Choose from "
                f"{', '.join(known)}."
            )
    if not words:
        raise ConfigError(f"--{name} is empty. Choose from {', '.join(known)}.")
    return [word for word in known if word in words]


def step_settings(plan: Plan, shape: str, **own: Any) -> dict[str, Any]:
    """Settings of one case of kind step, all that decide its result."""
    return {
        "shape": shape,
        "model": shape,
        "seq_len": plan.seq_len,
        "batch_size": 1,
        "lora_r": 8,
        "target_modules": "all-linear",
        "optimizer": "sgd",
        "compute_dtype": "float32",
        "steps": plan.steps,
        **own,
    }


def _step(plan: Plan, group: str, shape: str, extra: str = "", **own: Any) -> Case:
    settings = step_settings(plan, shape, **own)
    parts = [part for part in (group, shape, extra, label(settings)) if part]
    return Case(file_name(*parts), group, "step", settings, plan.rounds)


def _models(plan: Plan) -> list[Case]:
    return [_step(plan, "models", shape, **own) for shape in plan.shapes for own in METHODS]


def _sequence(plan: Plan) -> list[Case]:
    return [
        _step(plan, "sequence", plan.small, f"t{length}", seq_len=length, **own)
        for length in plan.lengths
        for own in METHODS
    ]


def _rank(plan: Plan) -> list[Case]:
    return [
        _step(plan, "rank", plan.small, f"r{rank}", lora_r=rank, **own)
        for rank in plan.ranks
        for own in _EXACT
    ]


def _store_h(plan: Plan) -> list[Case]:
    recompute, store = {"method": "mesp"}, {"method": "mesp", "recompute_h": False}
    return [
        _step(plan, "store_h", shape, **own) for shape in plan.shapes for own in (recompute, store)
    ]


def _timeline(plan: Plan) -> list[Case]:
    cases = []
    for own in METHODS:
        settings = step_settings(plan, plan.small, **own)
        name = file_name("timeline", plan.small, label(settings))
        cases.append(Case(name, "timeline", "timeline", settings))
    return cases


def _quality(plan: Plan) -> list[Case]:
    settings = {
        "shape": plan.small,
        "model": plan.small,
        "seq_len": plan.quality_seq_len,
        "lora_r": 8,
        "target_modules": "all-linear",
        "compute_dtype": "float32",
        "directions": plan.directions,
    }
    return [Case(file_name("quality", plan.small), "quality", "quality", settings)]


def _convergence(plan: Plan) -> list[Case]:
    return [
        Case(
            file_name("convergence", "demo", method),
            "convergence",
            "convergence",
            convergence_settings(method, plan.iters),
        )
        for method in CONVERGENCE_METHODS
    ]


def _peers(plan: Plan) -> list[Case]:
    return peer_cases(plan.small, plan.seq_len, plan.steps, plan.rounds)


_BUILDERS: dict[str, Callable[[Plan], list[Case]]] = {
    "models": _models,
    "sequence": _sequence,
    "rank": _rank,
    "store_h": _store_h,
    "quality": _quality,
    "convergence": _convergence,
    "timeline": _timeline,
    "peers": _peers,
}
