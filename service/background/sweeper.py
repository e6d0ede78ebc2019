"""The sweeper: a pass of retention every so often, by the API process that leads."""

import logging
from collections.abc import Sequence

from service.db.engine import make_engine, make_sessions
from service.db.locks import Lock
from service.db.loop import BackgroundLoop
from service.retention.service import collect
from service.settings import ApiSettings, DatabaseSettings
from service.storage.artifacts import ArtifactStore

log = logging.getLogger(__name__)

_SOON_SECONDS = 60.0  # the first pass, an attempt to lead, and the next one after an error


class Sweeper(BackgroundLoop):
    name = "sweeper"
    leader_lock = Lock.SWEEPER

    def __init__(self, settings: ApiSettings, store: ArtifactStore) -> None:
        self._retention = settings.retention
        self._store = store
        self._seconds = settings.retention.sweep_minutes * 60
        soon = min(_SOON_SECONDS, self._seconds)
        # Not at once: a service that starts has better things to do, and one that restarts in a loop would do nothing else.
        super().__init__(settings.database, retry_seconds=soon, first_after_seconds=soon)
        self._engine = make_engine(DatabaseSettings(url=settings.database.url, pool_size=1))
        self._sessions = make_sessions(self._engine)

    def stop(self) -> None:
        """Ends it, in the midst of a pass too: the rest is left for the next one."""
        super().stop()
        self._engine.dispose()

    def work(self, payloads: Sequence[str]) -> float:  # noqa: ARG002
        found = collect(self._sessions, self._store, self._retention, stopping=self._stopping)
        for kind, tally in sorted(found.removed.items()):
            log.info("collected %s: %d files, %d bytes", kind, tally.files, tally.bytes)
        return self._seconds
