"""The loop of all background threads: one connection to PostgreSQL, which listens, perhaps leads, and is made again when lost."""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import psycopg
from psycopg.conninfo import make_conninfo

from service.db.engine import KEEPALIVE, libpq_url
from service.db.locks import Lock
from service.settings import DatabaseSettings

log = logging.getLogger(__name__)

_STEP_SECONDS = 0.1  # how soon it ends after `stop`


class BackgroundLoop(ABC):
    """A thread that calls `work` at once, on every notification and whenever the wait that `work` returned is over.

    `start` and `stop` it once. `channel`: what it listens on. `leader_lock`: of all processes, only the one that holds the lock
    works, until its connection is lost. `rest_seconds`: after each pass, in which the notifications of a burst gather for one.
    """

    name: ClassVar[str]
    channel: ClassVar[str | None] = None
    leader_lock: ClassVar[Lock | None] = None
    rest_seconds: ClassVar[float] = 0.0

    def __init__(self, database: DatabaseSettings, *, retry_seconds: float, first_after_seconds: float = 0.0) -> None:
        """`retry_seconds`: before the next attempt to connect, to lead, or to do work that failed."""
        named = {"application_name": f"winnow {self.name}"}
        self._url = make_conninfo(libpq_url(database.url), connect_timeout=10, **KEEPALIVE, **named)
        self._retry_seconds = retry_seconds
        self._first_after_seconds = first_after_seconds
        self._connection: psycopg.Connection | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)

    @abstractmethod
    def work(self, payloads: Sequence[str]) -> float:
        """One pass; `payloads` are those of the notifications, none where it starts or the wait was over.

        Returns:
            Seconds until the next pass at the latest.
        """

    def serving(self) -> AbstractContextManager[object]:
        """Entered while the loop is connected, and leads."""
        return nullcontext()

    def on_failure(self) -> None:  # noqa: B027
        """Called when a pass failed or the database was away."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with psycopg.connect(self._url, autocommit=True) as self._connection:
                    connection = self._connection
                    if not self._leads(connection):
                        return
                    if self.channel is not None:
                        connection.execute(f"LISTEN {self.channel}")
                    with self.serving():
                        self._serve(connection)
            except psycopg.Error as error:
                self.on_failure()
                log.warning("%s: the database is away (%s); trying again", self.name, type(error).__name__)
                self._stopping.wait(self._retry_seconds)

    def _leads(self, connection: psycopg.Connection) -> bool:
        """Waits for leadership; False where it is stopped before that."""
        if self.leader_lock is None:
            return True
        take = "SELECT pg_try_advisory_lock(%s)"
        while connection.execute(take, [self.leader_lock.value]).fetchone() != (True,):
            if self._stopping.wait(self._retry_seconds):
                return False
        return True

    def _serve(self, connection: psycopg.Connection) -> None:
        wait_seconds = self._first_after_seconds
        while True:
            payloads = self._wait(connection, wait_seconds)
            if self._stopping.is_set():
                return
            wait_seconds = self.run_pass(payloads)
            if self.rest_seconds:
                self._stopping.wait(self.rest_seconds)

    def run_pass(self, payloads: Sequence[str] = ()) -> float:
        """`work`, but an error (a deadlock, a failover, a store that is away) is logged, and the pass repeated soon."""
        try:
            return self.work(payloads)
        except Exception:
            log.exception("%s: the pass failed; it is repeated in %g s", self.name, self._retry_seconds)
            self.on_failure()
            return self._retry_seconds

    def _wait(self, connection: psycopg.Connection, seconds: float) -> list[str]:
        """Returns on a notification, after `seconds`, or soon after `stop`."""
        deadline = time.monotonic() + seconds
        while not self._stopping.is_set() and (left := deadline - time.monotonic()) > 0:
            if found := list(connection.notifies(timeout=min(left, _STEP_SECONDS), stop_after=1)):
                return [notification.payload for notification in found]
        return []
