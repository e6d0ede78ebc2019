"""Tells requests that wait for a job when something has happened to it.

One thread and one connection listen for all of them. A request that waits holds neither, nor a connection of the pool; it is
woken and looks for itself. It also looks every few seconds: a notification that was lost costs seconds.
"""

import asyncio
import logging
import signal
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, TypeAlias

import psycopg
from fastapi import Request
from psycopg.conninfo import make_conninfo

from service.database import KEEPALIVE, libpq_url
from service.settings import DatabaseSettings

log = logging.getLogger(__name__)

CHANNEL = "winnow_events"  # its payload is the id of the job; a trigger on job_events notifies
_LOOK_SECONDS = 5.0
_BLIND_LOOK_SECONDS = 1.0
_STEP_SECONDS = 0.1  # how soon it ends when it is told to
_RECONNECT_SECONDS = 1.0

_Handler: TypeAlias = Callable[[int, FrameType | None], Any]


class Waiter:
    """One request that waits. `gone`: nobody waits any more, its client has left or the process stops."""

    def __init__(self, watch: "Watch") -> None:
        self.gone = False
        self.waited_seconds = 0.0
        self._watch = watch
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()

    async def wait(self, seconds: float) -> None:
        """Returns when something may have happened: at the latest after `seconds`, and after a few in any case."""
        started = self._loop.time()
        look_after = _LOOK_SECONDS if self._watch.is_listening else _BLIND_LOOK_SECONDS
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


class Watch:
    """A thread; `start` and `stop` it once. Where it does not run, who waits looks once a second."""

    def __init__(self, settings: DatabaseSettings) -> None:
        self._url = libpq_url(settings.url)
        self._lock = threading.Lock()
        self._waiters: defaultdict[str, set[Waiter]] = defaultdict(set)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.is_listening = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=10)

    def release_on_signals(self) -> None:
        """When the process is told to stop, who waits is answered: the server ends only after the requests that run."""
        if threading.current_thread() is not threading.main_thread():
            return  # the application runs in another program, which has its own way to stop
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
        """What happens to the job from here on wakes the waiter: look first, and then wait."""
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

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._listen()
            except psycopg.Error as error:
                log.warning("watch: the database is away (%s); trying again", type(error).__name__)
            self.is_listening = False
            self._stopping.wait(_RECONNECT_SECONDS)

    def _listen(self) -> None:
        """Until the connection is lost or we stop."""
        url = make_conninfo(self._url, connect_timeout=10, **KEEPALIVE)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"LISTEN {CHANNEL}")
            self.is_listening = True
            with self._lock:
                missed = list(self._waiters)
            for job_id in missed:  # what happened while nobody listened
                self._wake(job_id)
            while not self._stopping.is_set():
                for notification in connection.notifies(timeout=_STEP_SECONDS):
                    self._wake(notification.payload)

    def _wake(self, job_id: str) -> None:
        with self._lock:
            waiters = list(self._waiters.get(job_id, ()))
        for waiter in waiters:
            waiter.wake()
