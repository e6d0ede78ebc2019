"""Tells the database that this worker runs: what `winnow doctor`, the metrics and an operator go by. No unit depends on it."""

import logging
import threading

from sqlalchemy.exc import DBAPIError

from service.database import Sessions
from service.jobs import repository
from worker.stages.keys import worker_version

log = logging.getLogger(__name__)


class Presence:
    """A thread that writes `seen_at` every few seconds; `start` and `stop` it once."""

    def __init__(self, sessions: Sessions, worker_id: str, beat_seconds: float) -> None:
        self._sessions = sessions
        self._worker_id = worker_id
        self._beat_seconds = beat_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and says that the worker ended in good order."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
            self._tell(stopped=True)

    def _run(self) -> None:
        while True:
            self._tell(stopped=False)
            if self._stopping.wait(self._beat_seconds):
                return

    def _tell(self, *, stopped: bool) -> None:
        try:
            with self._sessions.begin() as session:
                repository.record_presence(session, self._worker_id, worker_version(), stopped=stopped)
        except DBAPIError as error:
            log.warning("the worker's presence was not written (%s)", type(error).__name__)
