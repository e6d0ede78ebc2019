"""Plans the jobs that were posted, and starts those that waited for an import when it ends, in the API process that leads. Apart
from the dispatcher: a plan may ask the hub, and no worker's wake-up waits for that."""

from collections.abc import Sequence

from service.db.engine import make_engine, make_sessions
from service.db.locks import Lock
from service.db.loop import BackgroundLoop
from service.jobs.first_plans import AT_ONCE, FirstPlans
from service.jobs.waiting import end_waiting
from service.settings import ApiSettings, DatabaseSettings
from service.storage.artifacts import ArtifactStore


class JobStarter(BackgroundLoop):
    name = "job starter"
    channel = "winnow_imports"
    leader_lock = Lock.JOB_STARTER
    rest_seconds = 0.1

    def __init__(self, settings: ApiSettings, store: ArtifactStore) -> None:
        super().__init__(settings.database, retry_seconds=settings.ledger.sweep_seconds)
        self._settings, self._store = settings, store
        self._engine = make_engine(DatabaseSettings(url=settings.database.url, pool_size=1))
        self._sessions = make_sessions(self._engine)
        self._plans = FirstPlans(self._sessions, store, settings)

    def stop(self) -> None:
        super().stop()
        self._engine.dispose()

    def work(self, payloads: Sequence[str]) -> float:
        while self._plans.write() > AT_ONCE // 2 and not self._stopping.is_set():
            pass
        is_about_plans = bool(payloads) and set(payloads) == {"plan"}
        while not is_about_plans and not self._stopping.is_set():
            if not end_waiting(self._sessions, self._store, self._settings):
                break
        return self._settings.ledger.sweep_seconds
