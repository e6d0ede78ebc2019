"""Wakes requests that wait for a job when something has happened to it.

One thread and one connection listen for all of them. A waiting request holds neither, nor a connection of the pool; once woken it
polls the database. It also polls every few seconds, so a lost notification costs seconds.
"""

import asyncio
import math
import signal
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, TypeAlias

from fastapi import Request

from service.db.loop import BackgroundLoop
from service.settings import DatabaseSettings

_LOOK_SECONDS = 5.0
_BLIND_LOOK_SECONDS = 1.0
_RECONNECT_SECONDS = 1.0

_Handler: TypeAlias = Callable[[int, FrameType | None], Any]


class Waiter:
    """A waiting request. `gone`: its client has disconnected or the process is stopping."""

    def __init__(self, notifications: "JobNotifications") -> None:
        self.gone = False
        self.waited_seconds = 0.0
        self._notifications = notifications
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()

    async def wait(self, seconds: float) -> None:
        """Returns when something may have happened, after `seconds` at the latest."""
        started = self._loop.time()
        look_after = _LOOK_SECONDS if self._notifications.is_listening else _BLIND_LOOK_SECONDS
        with suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, look_after)):
                await self._woken.wait()
        self._woken.clear()
        self.waited_seconds += self._loop.time() - started

    def wake(self) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # its loop has been closed
            self._loop.call_soon_threadsafe(self._woken.set)

    async def leave_with(self, request: Request) -> None:
        """Ends the waiting when the client closes its connection."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._woken.set()


class JobNotifications(BackgroundLoop):
    """While it is not listening, waiting requests poll once a second."""

    name = "notifications"
    channel = "winnow_events"  # its payload is the id of the job; a trigger on job_events notifies

    def __init__(self, settings: DatabaseSettings) -> None:
        super().__init__(settings, retry_seconds=_RECONNECT_SECONDS)
        self._lock = threading.Lock()
        self._waiters: defaultdict[str, set[Waiter]] = defaultdict(set)
        self.is_listening = False

    def release_on_signals(self) -> None:
        """Answers waiting requests when the process is signalled to stop, since the server waits for open requests."""
        if threading.current_thread() is not threading.main_thread():
            return  # embedded in another program, which handles signals itself
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.getsignal(number)
            if callable(before):
                signal.signal(number, partial(self._release_then, loop, before))

    def _release_then(
        self, loop: asyncio.AbstractEventLoop, then: _Handler, number: int, frame: FrameType | None
    ) -> None:
        loop.call_soon_threadsafe(self._release)
        then(number, frame)

    def _release(self) -> None:
        self._stopping.set()
        with self._lock:
            waiting = [waiter for waiters in self._waiters.values() for waiter in waiters]
        for waiter in waiting:
            waiter.gone = True
            waiter.wake()

    @asynccontextmanager
    async def waiting(self, job_id: str, request: Request) -> AsyncIterator[Waiter]:
        """Events of the job from here on wake the waiter: read the job first, then wait."""
        waiter = Waiter(self)
        leaving = asyncio.create_task(waiter.leave_with(request))
        with self._lock:
            self._waiters[job_id].add(waiter)
        waiter.gone = self._stopping.is_set()
        try:
            yield waiter
        finally:
            leaving.cancel()
            request.state.waited_seconds = waiter.waited_seconds
            with self._lock:
                self._waiters[job_id].discard(waiter)
                if not self._waiters[job_id]:
                    del self._waiters[job_id]

    @contextmanager
    def serving(self) -> Iterator[None]:
        self.is_listening = True
        try:
            yield
        finally:
            self.is_listening = False

    def work(self, payloads: Sequence[str]) -> float:
        """Wakes the waiters of these jobs; without payloads (just connected) all waiters, since events may have been missed."""
        with self._lock:
            jobs = payloads or self._waiters
            waiters = [waiter for job_id in jobs for waiter in self._waiters.get(job_id, ())]
        for waiter in waiters:
            waiter.wake()
        return math.inf
