"""Writes to the database that this worker runs, for `winnow doctor`, the metrics and an operator. No unit depends on it."""

import logging
import threading
from collections.abc import Callable
from typing import Any

from sqlalchemy.exc import DBAPIError

from service.db.engine import Sessions
from service.ledger.workers import record_worker
from service.plan.versions import worker_version

log = logging.getLogger(__name__)


class Heartbeat:
    """A thread that writes `seen_at` every few seconds, with what the worker lacks; `start` and `stop` it once."""

    def __init__(
        self,
        sessions: Sessions,
        worker_id: str,
        beat_seconds: float,
        lacks: Callable[[], list[dict[str, Any]]],
    ) -> None:
        self._sessions = sessions
        self._worker_id = worker_id
        self._beat_seconds = beat_seconds
        self._lacks = lacks
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and records a clean shutdown."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
            self.beat(stopped=True)

    def _run(self) -> None:
        self.beat()
        while not self._stopping.wait(self._beat_seconds):
            self.beat()

    def beat(self, *, stopped: bool = False) -> None:
        """Writes it now."""
        try:
            with self._sessions.begin() as session:
                record_worker(session, self._worker_id, worker_version(), stopped=stopped, lacks=self._lacks())
        except DBAPIError as error:
            log.warning("the worker's heartbeat was not written (%s)", type(error).__name__)
