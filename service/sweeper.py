"""The sweeper: every so often one pass of the collection, in the API process; an advisory lock lets one of them lead."""

import logging
import threading

from sqlalchemy import Connection, func, select
from sqlalchemy.exc import DBAPIError

from service.artifacts import ArtifactStore
from service.collection.service import collect
from service.database import make_engine, make_sessions
from service.settings import ApiSettings, DatabaseSettings

log = logging.getLogger(__name__)

_LEADER_LOCK = 0x73776565706572  # "sweeper"
_SOON_SECONDS = 60.0  # the first pass, a try to lead, and the next try after an error


class Sweeper:
    """A thread; `start` and `stop` it once."""

    def __init__(self, settings: ApiSettings, store: ArtifactStore) -> None:
        self._retention = settings.retention
        self._store = store
        self._seconds = settings.retention.sweep_minutes * 60
        self._soon = min(_SOON_SECONDS, self._seconds)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)
        self._engine = make_engine(DatabaseSettings(url=settings.database.url, pool_size=1))
        self._sessions = make_sessions(self._engine)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends it, in the midst of a pass too: what is left is for the next one."""
        self._stopping.set()
        self._thread.join(timeout=10)
        self._engine.dispose()

    def _run(self) -> None:
        # Not at once: a service that starts has better things to do, and one that starts again and again would do no other.
        while not self._stopping.wait(self._soon):
            try:
                self._lead()
            except DBAPIError as error:
                log.warning("sweeper: the database is away (%s); trying again", type(error).__name__)

    def _lead(self) -> None:
        """Sweeps, if no other process leads, until the connection that holds the lock is lost or we stop."""
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.detach()  # closing it ends its session, and with that the lock
            while _leads(connection):
                if self._stopping.wait(self._soon if not self._sweep() else self._seconds):
                    return

    def _sweep(self) -> bool:
        """One pass; False where it failed."""
        try:
            found = collect(self._sessions, self._store, self._retention, stopping=self._stopping)
        except Exception:
            # One bad pass (a store that is away, a job's creation that does not end) must not be the last.
            log.exception("sweeper: the pass failed; it is tried again")
            return False
        for kind, tally in sorted(found.removed.items()):
            log.info("collected %s: %d files, %d bytes", kind, tally.files, tally.bytes)
        return True


def _leads(connection: Connection) -> bool:
    """Whether we hold the lock. That a connection already has it does not keep it from having it again."""
    return bool(connection.scalar(select(func.pg_try_advisory_lock(_LEADER_LOCK))))
