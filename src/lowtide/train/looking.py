"""The settings of what goes on beside the updates: samples, trackers, manners on the device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowtide.config import flag, setting
from lowtide.device import SYS, on_battery, temperature_c
from lowtide.errors import ConfigError

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
