"""The dispatcher: wakes workers for pending units and takes back expired leases.

It runs in every API process; an advisory lock in PostgreSQL lets one of them lead. It acts at once on NOTIFY and again on
a sweep, so a lost notification or a lost message delays work by one sweep and loses nothing. Only here is the broker
touched by the API: a request never waits for it.
"""

import logging
import threading

import psycopg
from celery import Celery
from kombu.exceptions import OperationalError as BrokerError
from prometheus_client import CollectorRegistry
from redis import RedisError

from service.database import libpq_url, make_engine, make_sessions
from service.jobs import ledger
from service.observability.metrics import DispatchMetrics
from service.settings import ApiSettings, DatabaseSettings

log = logging.getLogger(__name__)

TASK = "winnow.work"
QUEUE = "winnow"
CHANNEL = "winnow_units"

LEADER_LOCK = 0x77696E6E6F77  # "winnow"
_MOST_MESSAGES = 64


def make_producer(broker_url: str) -> Celery:
    """A Celery application that only publishes. Short timeouts: a broker that is away must not hold the dispatcher."""
    app = Celery("winnow", broker=broker_url)
    app.conf.update(
        task_ignore_result=True,
        task_default_queue=QUEUE,
        broker_transport_options={"socket_timeout": 3, "socket_connect_timeout": 3},
    )
    return app


class Dispatcher:
    """A thread; `start` and `stop` it once."""

    def __init__(self, settings: ApiSettings, metrics: DispatchMetrics | None = None) -> None:
        self._settings = settings
        self._metrics = metrics or DispatchMetrics(CollectorRegistry())
        self._retries = ledger.Retries(max_attempts=settings.ledger.max_attempts, seconds=settings.ledger.retry_seconds)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)
        self._producer = make_producer(settings.broker.url)
        self._engine = make_engine(DatabaseSettings(url=settings.database.url, pool_size=1))
        self._sessions = make_sessions(self._engine)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=10)
        self._producer.close()
        self._engine.dispose()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._lead()
            except psycopg.Error as error:
                self._metrics.failed_passes.inc()
                log.warning("dispatcher: the database is away (%s); trying again", type(error).__name__)
                self._stopping.wait(self._settings.ledger.sweep_seconds)

    def _lead(self) -> None:
        """Waits to become the leader, then dispatches until the connection that holds the lock is lost or we stop."""
        with psycopg.connect(libpq_url(self._settings.database.url), autocommit=True) as connection:
            while connection.execute("SELECT pg_try_advisory_lock(%s)", [LEADER_LOCK]).fetchone() != (True,):
                if self._stopping.wait(self._settings.ledger.sweep_seconds):
                    return
            with self._metrics.leading.track_inprogress():
                connection.execute(f"LISTEN {CHANNEL}")
                while not self._stopping.is_set():
                    self._dispatch()
                    self._wait_for_notification(connection)

    def _wait_for_notification(self, connection: psycopg.Connection) -> None:
        """Returns on a notification, after one sweep interval, or soon after `stop`."""
        step = min(0.1, self._settings.ledger.sweep_seconds)
        waited = 0.0
        while waited < self._settings.ledger.sweep_seconds and not self._stopping.is_set():
            if list(connection.notifies(timeout=step, stop_after=1)):
                return
            waited += step

    def _dispatch(self) -> None:
        """One pass: expired leases back, then as many messages as there are pending units that none waits for yet."""
        try:
            with self._sessions.begin() as session:
                leases = ledger.expire_leases(session, retries=self._retries)
                cancels = ledger.expire_cancels(session, after_seconds=self._settings.ledger.cancel_seconds)
                waiting = ledger.claimable_count(session, most=_MOST_MESSAGES)
        except Exception:
            # One bad pass (a deadlock, a failover) must not end the dispatcher: the next sweep looks again.
            log.exception("dispatcher: the pass over the ledger failed; the next sweep tries again")
            self._metrics.failed_passes.inc()
            return
        self._metrics.leases.inc(leases)
        self._metrics.cancels.inc(cancels)
        if leases or cancels:
            log.warning("dispatcher: took %d units back from silent workers, forced %d cancels", leases, cancels)
        if waiting:
            self._wake(waiting)

    def _wake(self, wanted: int) -> None:
        try:
            with self._producer.connection_for_write() as connection:
                connection.ensure_connection(max_retries=1, timeout=3)
                queued = _queue_length(connection)
                for _ in range(wanted - queued):
                    self._producer.send_task(TASK, queue=QUEUE, connection=connection, retry=False)
                    self._metrics.messages.inc()
        except (BrokerError, RedisError, OSError) as error:
            self._metrics.broker_failures.inc()
            log.warning("dispatcher: the broker is away (%s); units wait for the next sweep", error)


def _queue_length(connection: object) -> int:
    """Messages that no worker has taken yet; so that sweeps with no worker there do not pile up messages."""
    client = connection.default_channel.client  # type: ignore[attr-defined]
    return int(client.llen(QUEUE))
