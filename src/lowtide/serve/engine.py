"""The one thread that computes: requests wait for it in a bounded queue."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from lowtide.errors import LowtideError
from lowtide.infer.answer import Answerer

from .catalogue import Catalogue
from .faults import Fault, fault_of
from .requests import Asked


@dataclass(frozen=True)
class Begun:
    """The prompt fits, and is being read."""

    fingerprint: str


@dataclass(frozen=True)
class Piece:
    """Some of the answer's text."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The answer is complete."""

    finish: str
    n_prompt: int
    n_tokens: int


Event = Begun | Piece | Ended | Fault


class _Cancelled(Exception):
    """Nobody waits for the answer any longer."""


class Ticket:
    """A request in the queue, for whoever waits on an event loop."""

    def __init__(self, asked: Asked) -> None:
        """For the running event loop."""
        self.asked = asked
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    async def event(self) -> Event:
        """What happens next; nothing does after `Ended` or a `Fault`."""
        return await self._events.get()

    def cancel(self) -> None:
        """Nobody waits any longer: the answer is not begun, or ends at its next token."""
        self.cancelled = True

    def tell(self, event: Event) -> None:
        """Called by the thread that computes."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def look(self) -> None:
        """End the work on it if it was cancelled."""
        if self.cancelled:
            raise _Cancelled


class Engine:
    """Answers one request at a time, in the order in which they came."""

    def __init__(
        self, answerer: Answerer, catalogue: Catalogue, queue: int, say: Callable[[str], None]
    ) -> None:
        """Start the thread.

        Args:
            answerer: used by the thread alone.
            catalogue: where names become adapters.
            queue: requests that may wait.
            say: told of every answer.
        """
        self._answerer, self._catalogue, self._most, self._say = answerer, catalogue, queue, say
        self._waiting: deque[Ticket] = deque()
        self._current: Ticket | None = None
        self._changed = threading.Condition()
        self._ended = False
        self._seconds = 5.0  # what an answer took lately
        self._thread = threading.Thread(target=self._run, name="lowtide-model", daemon=True)
        self._thread.start()

    def submit(self, asked: Asked) -> Ticket:
        """Put a request into the queue.

        Args:
            asked: the request.

        Returns:
            Its ticket.

        Raises:
            Fault: the queue is full, or the server is ending.
        """
        ticket = Ticket(asked)
        with self._changed:
            if self._ended:
                raise Fault(503, "the server is ending.", code="shutting_down")
            if any(one.cancelled for one in self._waiting):
                self._waiting = deque(one for one in self._waiting if not one.cancelled)
            # The model is free when the queue is empty, whatever the queue's length.
            busy = len(self._waiting) + (self._current is not None)
            if busy > self._most:
                raise Fault(
                    429, f"the model answers one request at a time, and {self._most:,} are waiting "
                    "already. Try again later, or start the server with a longer --queue.",
                    code="queue_full", retry_after=max(1, min(60, round(self._seconds))),
                )  # fmt: skip
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def stop(self) -> None:
        """End the current answer at its next token, and refuse what waits."""
        with self._changed:
            self._ended = True
            waiting, self._waiting = list(self._waiting), deque()
            current = self._current
            self._changed.notify()
        for ticket in [*waiting, *([current] if current else [])]:
            ticket.cancel()
            ticket.tell(Fault(503, "the server is ending.", code="shutting_down"))

    def join(self, timeout: float) -> None:
        """Wait for the thread to end after `stop`."""
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._current = None
                while not self._waiting and not self._ended:
                    self._changed.wait()
                if self._ended:
                    return
                ticket = self._current = self._waiting.popleft()
            self._work(ticket)

    def _work(self, ticket: Ticket) -> None:
        """Answer one request; whatever goes wrong is told, and the thread goes on."""
        try:
            ticket.look()
            self._answer(ticket)
        except _Cancelled:
            self._say(f"{ticket.asked.model}: the client has gone")
        except Exception as error:
            if not isinstance(error, LowtideError | Fault | MemoryError):
                traceback.print_exc(file=sys.stderr)
            self._finish(ticket, fault_of(error))

    def _finish(self, ticket: Ticket, event: Event) -> None:
        """Tell the last event when the model is free: whoever hears it may ask again at once."""
        with self._changed:
            self._current = None
        ticket.tell(event)

    def _answer(self, ticket: Ticket) -> None:
        started = time.monotonic()
        asked = ticket.asked
        adapter, fingerprint = self._catalogue.get(asked.model)
        self._answerer.keep_only(self._catalogue.adapters)
        prompt = asked.encode(self._answerer.tokenizer)
        answer = self._answerer.answer(adapter, prompt, asked.wanted, ticket.look)
        ticket.tell(Begun(fingerprint))
        for piece in answer:
            ticket.tell(Piece(piece))
        assert answer.finish is not None
        self._seconds = time.monotonic() - started
        self._say(
            f"{asked.model}: {answer.n_prompt:,} + {answer.n_tokens:,} tokens in "
            f"{self._seconds:.1f} s"
        )
        self._finish(ticket, Ended(answer.finish, answer.n_prompt, answer.n_tokens))
