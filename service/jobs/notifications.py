"""Wakes requests that wait for a job when something has happened to it.

One thread and one connection listen for all of them. A waiting request holds neither, nor a connection of the pool; once woken it
polls the database. The thread also looks at all their jobs every few seconds, so a lost notification costs seconds.
"""

import asyncio
import signal
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, TypeAlias

import psycopg
from fastapi import Request

from service.db.loop import BackgroundLoop
from service.settings import DatabaseSettings

_LOOK_SECONDS = 5.0
_BLIND_LOOK_SECONDS = 1.0
_RECONNECT_SECONDS = 1.0
_STATES = """
    SELECT id, status, (SELECT max(id) FROM job_events WHERE job_id = selection_jobs.id)
    FROM selection_jobs WHERE id = ANY(%s)
"""

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
        """Returns when something may have happened, after `seconds` at the latest. While nothing is listened to, that is each
        second."""
        started = self._loop.time()
        deadline = started + seconds
        while not self._woken.is_set() and (left := deadline - self._loop.time()) > 0:
            is_blind = not self._notifications.is_listening
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, _BLIND_LOOK_SECONDS if is_blind else _LOOK_SECONDS)):
                    await self._woken.wait()
            if is_blind:
                break
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
        self._seen: dict[str, list[Any]] = {}
        self._look_due = 0.0
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
        self._seen = {}
        self.is_listening = True
        try:
            yield
        finally:
            self.is_listening = False

    def work(self, payloads: Sequence[str]) -> float:
        """Wakes the waiters of these jobs, and every few seconds of those that have changed all the same."""
        jobs = set(payloads)
        if not payloads or time.monotonic() >= self._look_due:
            jobs |= self._changed()
            self._look_due = time.monotonic() + _LOOK_SECONDS
        with self._lock:
            waiters = [waiter for job_id in jobs for waiter in self._waiters.get(job_id, ())]
        for waiter in waiters:
            waiter.wake()
        return max(0.0, self._look_due - time.monotonic())

    def _changed(self) -> set[str]:
        """Of the jobs that are waited for, those that are not as they were at the last look; what has happened to one before its
        first look may have been missed, too."""
        with self._lock:
            jobs = list(self._waiters)
        if not jobs or self._connection is None:
            return set()
        try:
            found = self._connection.execute(_STATES, [jobs]).fetchall()
        except psycopg.OperationalError:  # it is lost, as the loop is about to notice
            return set()
        before, self._seen = self._seen, {job_id: state for job_id, *state in found}
        return {job_id for job_id in jobs if job_id not in before or before[job_id] != self._seen.get(job_id)}
