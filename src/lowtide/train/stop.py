"""Ending a run from outside: Ctrl-C, SIGTERM and SIGHUP end it at the next place where it is whole.

The first signal waits for the end of the update or save that is being made; where nothing is being
made it ends the run at once. The second ends the process as it would without us. SIGUSR1 asks for
a pause and SIGUSR2 to go on; they are heard from the start, also while the model is loaded.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

PAUSE, GO_ON = signal.SIGUSR1, signal.SIGUSR2
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """Whether the run was asked to end, or to pause."""

    def __init__(self, on_waiting: Callable[[], None] = lambda: None) -> None:
        """Nobody has asked yet.

        Args:
            on_waiting: called when a signal has to wait for an update.
        """
        self.requested = self.pausing = False
        self._on_waiting = on_waiting
        self._shields: list[bool] = []
        self._before: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear the signals; those that the process was started to ignore stay ignored.

        Yields:
            None; in a thread that is not the main one, without having changed anything.
        """
        if threading.current_thread() is threading.main_thread():
            found = {n: signal.getsignal(n) for n in (*_SIGNALS, PAUSE, GO_ON)}
            self._before = {n: h for n, h in found.items() if h is not signal.SIG_IGN}
        try:
            for number in self._before:
                heard = self._hear_pause if number in (PAUSE, GO_ON) else self._hear
                signal.signal(number, heard)
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, self._before[number])
        self.requested = True
        if not self._shields:
            raise KeyboardInterrupt
        if any(self._shields):
            self._on_waiting()

    def _hear_pause(self, number: int, frame: FrameType | None) -> None:
        self.pausing = number == PAUSE

    @contextmanager
    def shielded(self, *, update: bool = False) -> Iterator[None]:
        """What is done within is finished first; `check` after it.

        Args:
            update: whether it takes so long that somebody should be told.

        Yields:
            None.
        """
        self._shields.append(update)
        try:
            yield
        finally:
            self._shields.pop()

    def check(self) -> None:
        """End the run here if that was asked for.

        Raises:
            KeyboardInterrupt: it was.
        """
        if self.requested:
            raise KeyboardInterrupt
