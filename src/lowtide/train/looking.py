"""The settings of what goes on beside the updates: samples, trackers, manners on the device."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from lowtide.config import flag, setting
from lowtide.data.text import unreadable
from lowtide.device import SYS, on_battery, temperature_c
from lowtide.errors import ConfigError, DataError, shown

SAMPLE_TOKENS = 48
COOLER_BY_C = 5.0


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Samples during training."""

    sample_prompt: tuple[str, ...] = setting(
        (),
        help="prompt to answer now and then during training; may be given several times",
        changeable=True,
    )
    sample_prompts_file: str | None = setting(
        None,
        help="file of such prompts: a line each, or .jsonl with texts or records that have a "
        "'prompt'; run.yaml keeps what it held",
        filled=True,
        changeable=True,
    )
    steps_per_sample: int | None = setting(
        None,
        help="updates between samples; none takes --steps-per-eval",
        minimum=1,
        changeable=True,
    )
    sample_tokens: int | None = setting(
        None,
        help=f"tokens of a sample at most; none takes {SAMPLE_TOKENS}",
        minimum=1,
        changeable=True,
    )


@dataclass(frozen=True, kw_only=True)
class TrackerSettings:
    """Other programs that take the figures."""

    report_to: str | None = setting(
        None,
        help="send the figures to tensorboard, to wandb, or to both, separated by commas",
        listed=True,
        filled=True,
        changeable=True,
    )


S = TypeVar("S", bound=SampleSettings)


def with_prompts(settings: S) -> S:
    """The settings with the prompts of the file among the others.

    Args:
        settings: of a run.

    Returns:
        Settings that need no file.

    Raises:
        DataError: it cannot be read, or a line is no prompt.
    """
    if settings.sample_prompts_file is None:
        return settings
    path = Path(settings.sample_prompts_file).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}).") from error
    except OSError as error:
        raise unreadable(path, error) from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    as_json = path.suffix.lower() == ".jsonl"
    found = [_prompt(path, *line) if as_json else line[1].rstrip("\r") for line in lines]
    if not found:
        raise DataError(f"{path} holds no prompts. Write one on each line.")
    prompts = (*settings.sample_prompt, *found)
    return replace(settings, sample_prompt=prompts, sample_prompts_file=None)


def _prompt(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    found = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(found, str) or "\0" in found:
        raise DataError(
            f'{path}, line {number}: expected a text such as "once" or a record such as '
            f'{{"prompt": "once"}}, and found {shown(line)}.'
        )
    return found


def check_samples(settings: SampleSettings) -> None:
    """Refuse settings of samples where there are none.

    Args:
        settings: of a run.

    Raises:
        ConfigError: names the setting.
    """
    for name in ("steps_per_sample", "sample_tokens"):
        if getattr(settings, name) is not None and not settings.sample_prompt:
            raise ConfigError(
                f"{flag(name)} is for --sample-prompt, which is not given. Leave it out."
            )


@dataclass(frozen=True, kw_only=True)
class MannerSettings:
    """Manners on the device."""

    nice: int | None = setting(
        None,
        help="niceness to run at, see nice(1): 19 runs only when nothing else wants the cores",
        minimum=0,
        maximum=19,
        changeable=True,
    )
    pause_on_battery: bool = setting(
        False,
        help="pause after the update while the device runs from its battery",
        changeable=True,
    )
    max_temperature: float | None = setting(
        None,
        help="pause after the update when the processor is hotter than this, in degrees Celsius, "
        f"until it is {COOLER_BY_C:g} degrees cooler",
        above=0,
        maximum=150,
        changeable=True,
    )


def check_manners(settings: MannerSettings, system: Path = SYS) -> None:
    """Refuse what this device cannot do.

    Args:
        settings: of a run.
        system: where the device tells of itself.

    Raises:
        ConfigError: names the setting.
    """
    if settings.pause_on_battery and on_battery(system) is None:
        raise ConfigError(
            f"--pause-on-battery: {system / 'power_supply'} tells of no battery. Leave it out."
        )
    if settings.max_temperature is not None and temperature_c(system) is None:
        raise ConfigError(
            f"--max-temperature: neither {system / 'thermal'} nor {system / 'hwmon'} tells a "
            "temperature here. Leave it out."
        )
