"""The dispatcher: wakes workers for pending units and tasks and takes back expired leases, in the API process that leads.

It acts at once on NOTIFY, once for all of a burst, and on every sweep, so a lost notification or a lost message delays work by
one sweep and loses nothing. Only here is the broker touched by the API: a request never waits for it.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

from celery import Celery
from kombu.connection import Connection
from kombu.exceptions import OperationalError as BrokerError
from prometheus_client import CollectorRegistry
from redis import RedisError
from sqlalchemy.exc import DBAPIError

from service import ledger, tasks
from service.db.engine import make_engine, make_sessions
from service.db.locks import Lock
from service.db.loop import BackgroundLoop
from service.ledger import store_identity
from service.observability.api_metrics import DispatchMetrics
from service.settings import ApiSettings, DatabaseSettings
from service.storage.artifacts import ArtifactStore

log = logging.getLogger(__name__)

TASK = "winnow.work"
QUEUE = "winnow"
MAX_MESSAGES = 64  # that wait at a time


def make_producer(broker_url: str) -> Celery:
    """A Celery application that only publishes. Short timeouts: a broker that is away must not hold the dispatcher."""
    app = Celery("winnow", broker=broker_url)
    app.conf.update(
        task_ignore_result=True,
        task_default_queue=QUEUE,
        broker_transport_options={"socket_timeout": 3, "socket_connect_timeout": 3},
    )
    return app


class Dispatcher(BackgroundLoop):
    name = "dispatcher"
    channel = "winnow_units"
    leader_lock = Lock.DISPATCHER
    rest_seconds = 0.02

    def __init__(self, settings: ApiSettings, metrics: DispatchMetrics | None = None) -> None:
        super().__init__(settings.database, retry_seconds=settings.ledger.sweep_seconds)
        self._settings = settings.ledger
        self._metrics = metrics or DispatchMetrics(CollectorRegistry())
        self._retries = ledger.Retries(max_attempts=settings.ledger.max_attempts, seconds=settings.ledger.retry_seconds)
        self._producer = make_producer(settings.broker.url)
        self._broker: Connection | None = (
            None  # kept: making it takes longer than a pass; Redis' client makes its sockets again
        )
        self._engine = make_engine(DatabaseSettings(url=settings.database.url, pool_size=1))
        self._sessions = make_sessions(self._engine)
        self._store = ArtifactStore(settings.artifacts.url)
        self._is_paired = False
        self._sweep_due = 0.0

    def stop(self) -> None:
        super().stop()
        self._disconnect()
        self._producer.close()
        self._engine.dispose()

    def serving(self) -> AbstractContextManager[object]:
        return self._metrics.leading.track_inprogress()

    def on_failure(self) -> None:
        self._metrics.failed_passes.inc()

    def work(self, payloads: Sequence[str]) -> float:  # noqa: ARG002
        """Sends as many messages as there are claimable units and tasks without one. Before that, a sweep if one is due."""
        if not self._is_paired:
            self._pair()
        if time.monotonic() >= self._sweep_due:  # what ends by time alone: no notification tells of it
            self._sweep()
            self._sweep_due = time.monotonic() + self._settings.sweep_seconds
        with self._sessions() as session:
            waiting = ledger.claimable_count(session, most=MAX_MESSAGES)
            waiting += tasks.claimable_count(session, most=MAX_MESSAGES)
        if waiting:
            self._wake(waiting)
        return max(0.0, self._sweep_due - time.monotonic())

    def _sweep(self) -> None:
        """Takes expired leases back, forces cancels that wait too long, and ends what no worker can do."""
        lease, after = self._settings.lease_seconds, self._settings.unable_seconds
        with self._sessions.begin() as session:
            unable = ledger.end_undoable(session, lease_seconds=lease, after_seconds=after)
            leases = ledger.expire_leases(session, retries=self._retries)
            cancels = ledger.expire_cancels(session, after_seconds=self._settings.cancel_seconds)
        with self._sessions.begin() as session:  # of its own: neither waits for the rows of the other
            leases += tasks.expire_leases(session, retries=self._retries)
            tasks.delete_expired(session)
        self._metrics.leases.inc(leases)
        self._metrics.cancels.inc(cancels)
        if leases or cancels:
            log.warning(
                "dispatcher: took %d units or tasks back from silent workers, forced %d cancels", leases, cancels
            )
        if unable:
            log.error("dispatcher: %d jobs failed that no live worker can do; see `winnow doctor`", unable)

    def _pair(self) -> None:
        """Before any worker is woken: it claims nothing before the store is known to be this database's."""
        try:
            store_identity.establish(self._sessions, self._store)
            self._is_paired = True
        except DBAPIError:
            raise
        except Exception as error:  # whatever the store's library raises: leases are taken back all the same
            log.error("dispatcher: the artifact store is not usable: %s", error)

    def _wake(self, wanted: int) -> None:
        try:
            if self._broker is None:
                self._broker = self._producer.connection_for_write()
                self._broker.ensure_connection(max_retries=1, timeout=3)
            for _ in range(wanted - _queue_length(self._broker)):
                self._producer.send_task(TASK, queue=QUEUE, connection=self._broker, retry=False)
                self._metrics.messages.inc()
        except (BrokerError, RedisError, OSError) as error:
            self._disconnect()
            self._metrics.broker_failures.inc()
            log.warning("dispatcher: the broker is away (%s); units wait for the next sweep", error)

    def _disconnect(self) -> None:
        if self._broker is not None:
            self._broker.release()  # type: ignore[no-untyped-call]
            self._broker = None


def _queue_length(connection: Connection) -> int:
    """Messages that no worker has taken yet: sweeps without a worker must not pile up more."""
    return int(connection.default_channel.client.llen(QUEUE))  # type: ignore[attr-defined]
