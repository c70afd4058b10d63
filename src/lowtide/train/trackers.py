"""`--report-to`: other programs that take a run's figures. Nothing of them is imported unasked.

A tracker gets the lines of metrics.jsonl as they are written. Measured on x86-64, above what a
training process holds: tensorboardX 1.7 MB, wandb 22 MB and a process of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from lowtide.errors import ConfigError, listed

from .output import TENSORBOARD_FOLDER
from .run_dir import RunDir


class Tracker(Protocol):
    """A program that takes the lines of metrics.jsonl as well."""

    name: str

    def log(self, entry: Mapping[str, Any]) -> None:
        """Take one line."""

    def close(self) -> None:
        """Write what is still held."""


class TensorBoard:
    """Event files in the run's directory, by tensorboardX, which needs no TensorFlow."""

    name = "tensorboard"

    def __init__(self, run_dir: RunDir, settings: Mapping[str, Any]) -> None:
        """Open an event file, which moves with the run's other files.

        Args:
            run_dir: of the run.
            settings: of the run, kept as text.
        """
        folder = run_dir.root / TENSORBOARD_FOLDER
        self._writer = _module("tensorboard").SummaryWriter(str(folder))
        rows = "\n".join(f"    {name}: {value}" for name, value in settings.items())
        self._writer.add_text("settings", rows, 0)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Scalars by their keys, samples as text."""
        step = entry["step"]
        if "sample" in entry:
            told = entry["sample"]
            quoted = "\n".join(f"    {line}" for line in str(told["text"]).splitlines())
            self._writer.add_text(f"sample/{told['prompt']}", quoted, step)
            return
        for name, value in scalars(entry):
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still held."""
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb, which its own environment variables set up (WANDB_MODE, WANDB_PROJECT)."""

    name = "wandb"

    def __init__(self, run_dir: RunDir, settings: Mapping[str, Any]) -> None:
        """Begin a run.

        Args:
            run_dir: of the run; wandb writes its own files below its directory.
            settings: of the run.
        """
        directory = run_dir.directory
        wandb = _module("wandb")
        self._run = wandb.init(dir=str(directory), config=dict(settings), name=directory.name)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Scalars by their keys, samples as text."""
        if "sample" in entry:
            told = entry["sample"]
            values: dict[str, Any] = {f"sample/{told['prompt']}": told["text"]}
        else:
            values = dict(scalars(entry))
        self._run.log(values, step=entry["step"])

    def close(self) -> None:
        """Write what is still held."""
        self._run.finish()


TRACKERS: dict[str, Callable[[RunDir, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
_GROUPS = {"valid_loss": "valid/loss"}


def scalars(entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line of metrics.jsonl, under the names that a tracker shows.

    Args:
        entry: of an update or a validation.

    Yields:
        `train/loss` and so on; `valid/loss`; a norm for each layer.
    """
    group = "valid" if "valid_loss" in entry else "train"
    for key, value in entry.items():
        if key == "step":
            continue
        if isinstance(value, int | float):
            yield _GROUPS.get(key, f"{group}/{key}"), value
        elif key == "grad_norms" and isinstance(value, list):
            for layer, norm in enumerate(value):
                if norm is not None:
                    yield f"grad_norms/layer_{layer:02d}", norm


def wanted_trackers(text: str | None) -> list[str]:
    """Names out of `--report-to`, each once.

    Args:
        text: names separated by commas; None or `none` for none.

    Returns:
        The names.

    Raises:
        ConfigError: there is no such tracker, or its library is not installed.
    """
    given = [name.strip() for name in (text or "none").split(",")]
    names = list(dict.fromkeys(name for name in given if name != "none"))
    problems = []
    for name in names:
        if name not in TRACKERS:
            problems.append(f"{name!r} is not known; choose {', '.join(TRACKERS)}")
            continue
        try:
            _module(name)
        except ImportError as error:
            problems.append(
                f"{name} needs {_MODULES[name]}, which cannot be imported ({error}); run: pip "
                f"install {_MODULES[name]}"
            )
    if problems:
        raise ConfigError(f"--report-to {text}:\n{listed(problems)}")
    return names


def _module(name: str) -> Any:
    return importlib.import_module(_MODULES[name])
