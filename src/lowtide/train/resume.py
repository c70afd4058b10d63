"""Going on with a run: which checkpoint, with which settings, and whether it is still the same run.

What a resumed run is given now wins where it leaves the run what it is: how long, how often it is
saved and reported, the learning rate, where files lie. What would make it another run is refused
where it differs. What is not given stays as it was.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lowtide.config import build, flag
from lowtide.errors import ConfigError, DataError, LowtideWarning, ModelError, OutputError, listed

from .checkpoints import Checkpoint, Checkpoints
from .fingerprint import version
from .settings import TrainSettings

_OF_THE_COMMAND = ("resume", "resume_anyway", "overwrite")


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on.

    Attributes:
        checkpoint: read and found whole.
        changes: one line for each setting that is given now and was another.
        damaged: one line for each newer checkpoint that cannot be used.
    """

    checkpoint: Checkpoint
    changes: tuple[str, ...]
    damaged: tuple[str, ...]

    @property
    def step(self) -> int:
        """Updates made so far."""
        return self.checkpoint.state.step

    def check_iters(self, iters: int) -> None:
        """Refuse a run that would have to be shorter than it is.

        Args:
            iters: updates that it shall have in all.

        Raises:
            ConfigError: says both numbers.
        """
        if iters < self.step:
            raise ConfigError(
                f"the run would end after {iters} updates, and has made {self.step}. Give --iters "
                f"of more than {self.step} to go on."
            )


def settle(given: Mapping[str, Any]) -> TrainSettings:
    """The settings of a run: those given, and with `resume` the others as they were.

    Args:
        given: values by setting, as `config.build` takes them.

    Returns:
        All settings.

    Raises:
        ConfigError: a value is wrong, or there is no run to resume.
        OutputError: the run's newest checkpoint cannot be used, and says why.
    """
    given = {str(key).replace("-", "_"): value for key, value in given.items()}
    if given.get("resume") is not True:
        return build(TrainSettings, given)
    if given.get("adapter_path") is None:
        raise ConfigError("--resume needs --adapter-path: the directory of the run to go on with.")
    checkpoint, _ = _newest(Path(str(given["adapter_path"])).expanduser())
    known = {one.name for one in fields(TrainSettings)}
    held = {name: v for name, v in checkpoint.state.settings.items() if name in known}
    if "iters" in given or "epochs" in given:  # either one says how long
        held |= {"iters": None, "epochs": None}
    if "sample_prompts_file" in given:
        held |= {"sample_prompt": ()}
    return build(TrainSettings, {**held, "overwrite": False, **given})


def _newest(directory: Path) -> tuple[Checkpoint, list[str]]:
    checkpoint, damaged = Checkpoints(directory).newest()
    if checkpoint is not None:
        return checkpoint, damaged
    if damaged:
        raise OutputError(
            f"no checkpoint in {directory} can be used:\n{listed(damaged)}\nStart again with "
            "--overwrite, or in another --adapter-path."
        )
    found = "holds no checkpoint" if directory.is_dir() else "is not a directory"
    raise OutputError(
        f"--resume: {directory} {found}, so there is nothing to go on with. Start the run without "
        "--resume."
    )


def find(directory: Path, settings: TrainSettings) -> Resumption:
    """The checkpoint that a run goes on from.

    Args:
        directory: of the run.
        settings: as they are now, all of them.

    Returns:
        Where it goes on.

    Raises:
        OutputError: there is no usable checkpoint, or it is of another version of lowtide.
        ConfigError: names all settings that would make it another run.
    """
    checkpoint, damaged = _newest(directory)
    made_by = checkpoint.lowtide
    if made_by != version() and not settings.resume_anyway:
        raise OutputError(
            f"the run in {directory} was made by lowtide {made_by}; this is {version()}, which may "
            "compute otherwise. Go on all the same with --resume-anyway."
        )
    now = json.loads(json.dumps(asdict(settings)))
    changes, refused = [], []
    for one in fields(TrainSettings):
        if one.name in _OF_THE_COMMAND:
            continue
        default = list(one.default) if isinstance(one.default, tuple) else one.default
        was, is_now = checkpoint.state.settings.get(one.name, default), now[one.name]
        if was == is_now:
            continue
        if one.metadata["rule"].changeable:
            changes.append(f"{one.name}: was {was}, now {is_now}")
        else:
            refused.append(f"{flag(one.name)} {is_now}: the run has {was}")
    if refused:
        raise ConfigError(
            f"--resume goes on with the run in {directory}, and these would make it another:\n"
            f"{listed(refused)}\nLeave them out, or start a new run in another --adapter-path."
        )
    return Resumption(checkpoint, tuple(changes), tuple(damaged))


def check_same(
    resumption: Resumption, settings: TrainSettings, fingerprints: Mapping[str, str | None]
) -> None:
    """See that model and data are those of the run.

    Args:
        resumption: where it goes on.
        settings: for their paths.
        fingerprints: now, by `model`, `train` and `valid`, or some of them.

    Raises:
        ModelError: the model is another.
        DataError: the data is another.
    """
    if settings.resume_anyway:
        return
    held = resumption.checkpoint.state.fingerprints
    for name, found in fingerprints.items():
        if found != held[name]:
            kind, what, where = {
                "model": (ModelError, "model", settings.model),
                "train": (DataError, "training data", settings.data),
                "valid": (DataError, "validation data", settings.valid_data or settings.data),
            }[name]
            raise kind(
                f"the {what} in {where} is not that of the run in {settings.adapter_path}: its "
                "content differs. Give the one that the run began with, or go on all the same with "
                "--resume-anyway."
            )


def check_arithmetic(
    resumption: Resumption, settings: TrainSettings, now: Mapping[str, str]
) -> None:
    """Say it where last digits will differ from those of a run that was not interrupted.

    Args:
        resumption: where it goes on.
        settings: whether such a run may go on.
        now: what `fingerprint.arithmetic` says.

    Raises:
        ConfigError: the run promised to be the same.
    """
    held = resumption.checkpoint.state.arithmetic
    changed = "; ".join(
        f"{key} {held[key]} then, {now[key]} now"
        for key in now
        if held.get(key, now[key]) != now[key]
    )
    if changed and settings.deterministic and not settings.resume_anyway:
        raise ConfigError(
            f"the run in {settings.adapter_path} is --deterministic, and its last digits would "
            f"change: {changed}. Go on where it began, or all the same with --resume-anyway."
        )
    if changed:
        warnings.warn(
            f"the run goes on, but not bit for bit as it would have: {changed}.",
            LowtideWarning,
            stacklevel=2,
        )
