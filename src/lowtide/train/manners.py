"""Manners on a device: pauses on request, from the battery, in the heat; low priority."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from lowtide.device import SYS, Paced, on_battery, temperature_c

from .history import StepReport
from .looking import COOLER_BY_C, MannerSettings
from .loop import Trainer
from .observers import Quiet

_SENSORS_S, _POLL_S = 5.0, 0.2


class Manners(Quiet):
    """Pauses a run before the first update and between two.

    What the sensors say is read every five seconds, so an update pays for a look at the clock.
    """

    def __init__(
        self,
        settings: MannerSettings,
        tell: Callable[[str | None], None],
        trainer: Trainer,
        system: Path = SYS,
        sensors_s: float = _SENSORS_S,
    ) -> None:
        """Nothing is read yet.

        Args:
            settings: when to pause.
            tell: hears the reason of a pause, and None when the run goes on.
            trainer: gives memory back for a pause; its `stop` hears who asks for one.
            system: where the device tells of itself.
            sensors_s: seconds between readings.
        """
        self._settings, self._tell, self._trainer = settings, tell, trainer
        self._hot = False
        self._battery = Paced(lambda: on_battery(system), sensors_s)
        self._heat = Paced(lambda: temperature_c(system), sensors_s)

    def on_step(self, report: StepReport) -> None:
        """Pause while there is a reason to."""
        self.pause()

    def pause(self) -> None:
        """The same, before there is an update."""
        reason = self._reason()
        if reason is None or self._trainer.stop.requested:
            return
        self._tell(reason)
        self._trainer.rest(True)
        while self._reason() is not None and not self._trainer.stop.requested:
            time.sleep(_POLL_S)
        self._trainer.rest(False)
        self._tell(None)

    def _reason(self) -> str | None:
        """Why to pause now."""
        if self._trainer.stop.pausing:
            return "asked to by SIGUSR1; SIGUSR2 goes on"
        if self._settings.pause_on_battery and self._battery():
            return "the device runs from its battery"
        return self._heat_reason()

    def _heat_reason(self) -> str | None:
        limit = self._settings.max_temperature
        if limit is None or (heat := self._heat()) is None:
            return None
        self._hot = heat > (limit - COOLER_BY_C if self._hot else limit)
        if not self._hot:
            return None
        return f"the processor is at {heat:.0f} °C; --max-temperature is {limit:g}"
