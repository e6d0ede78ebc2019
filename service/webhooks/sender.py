"""The sender: posts deliveries that are due, in every API process, many at a time; acts at once on NOTIFY and again on a sweep.

A delivery is claimed before it is sent, by a lease: a process that dies meanwhile costs a message that comes twice, never one
that does not come. No transaction is open during a request.
"""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import psycopg
from prometheus_client import CollectorRegistry
from sqlalchemy.engine import make_url

from service.audit import service as audit
from service.database import make_engine, make_sessions
from service.observability.metrics import WebhookMetrics
from service.sealing import Sealer, Unsealable
from service.settings import ApiSettings, DatabaseSettings
from service.webhooks import repository, signature
from service.webhooks.connect import Outbound, Refused, Undelivered
from service.webhooks.repository import Due
from service.webhooks.tables import WebhookDelivery, WebhookEndpoint

log = logging.getLogger(__name__)

# After each attempt that failed, the wait for the next: 24 hours in all. Receivers know these from Svix.
SCHEDULE = (5.0, 300.0, 1_800.0, 7_200.0, 18_000.0, 28_800.0, 28_800.0)
_JITTER = 0.1
_LONGEST_RETRY_AFTER = 3_600.0

# So that neither a slow endpoint nor a tenant with many holds up the others.
AT_ONCE = 32
_OF_TENANT = 8
_OF_ENDPOINT = 2

_SWEEP_SECONDS = 2.0
_STEP_SECONDS = 0.1  # how soon it ends when it is told to
_SPARE_SECONDS = 30.0  # of a lease, beyond the request: for what is written before and after it


@dataclass(frozen=True, slots=True)
class _Outcome:
    """`error`: why it is not delivered; in words for who owns the endpoint."""

    status: int | None = None
    error: str | None = None
    retry_after: str | None = None


class Sender:
    """A thread that claims and others that send; `start` and `stop` it once."""

    def __init__(
        self, settings: ApiSettings, sealer: Sealer, outbound: Outbound, metrics: WebhookMetrics | None = None
    ) -> None:
        self._url = make_url(settings.database.url).set(drivername="postgresql").render_as_string(hide_password=False)
        self._lease_seconds = settings.webhooks.timeout_seconds + _SPARE_SECONDS
        self._sealer = sealer
        self._outbound = outbound
        self._metrics = metrics or WebhookMetrics(CollectorRegistry())
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)
        self._posts = ThreadPoolExecutor(AT_ONCE, "webhook")
        self._claiming = threading.Lock()
        self._endpoints: Counter[str] = Counter()  # requests under way, by endpoint and by tenant
        self._tenants: Counter[str] = Counter()
        self._engine = make_engine(DatabaseSettings(url=settings.database.url, pool_size=2))
        self._sessions = make_sessions(self._engine)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Lets requests that are under way end, which they do within their timeout."""
        with self._claiming:
            self._stopping.set()
        self._thread.join(timeout=10)
        self._posts.shutdown()
        self._engine.dispose()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._listen()
            except psycopg.Error as error:
                log.warning("webhooks: the database is away (%s); trying again", type(error).__name__)
                self._stopping.wait(_SWEEP_SECONDS)

    def _listen(self) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            connection.execute(f"LISTEN {repository.CHANNEL}")
            while not self._stopping.is_set():
                self.send_due()
                waited = 0.0
                while waited < _SWEEP_SECONDS and not self._stopping.is_set():
                    if list(connection.notifies(timeout=_STEP_SECONDS, stop_after=1)):
                        break
                    waited += _STEP_SECONDS

    def send_due(self) -> None:
        """Claims as many of what is due as may be under way, and hands them to threads. Each calls it again when it is done."""
        with self._claiming:
            if self._stopping.is_set():
                return
            try:
                with self._sessions.begin() as session:
                    repository.fail_unwanted(session)
                    chosen = self._fair(repository.due(session, each=_OF_ENDPOINT))
                    claimed = repository.claim(session, chosen, lease_seconds=self._lease_seconds) if chosen else []
            except Exception:
                # One bad pass must not end the sender: the next sweep looks again.
                log.exception("webhooks: the pass over deliveries failed; the next sweep tries again")
                return
            for delivery, endpoint in claimed:
                self._endpoints[endpoint.id] += 1
                self._tenants[endpoint.tenant_id] += 1
                self._posts.submit(self._deliver, delivery, endpoint)

    def _fair(self, due: Iterable[Due]) -> list[str]:
        """Those of them for which there is a place, what waits longest first."""
        endpoints, tenants, chosen = self._endpoints.copy(), self._tenants.copy(), []
        for one in due:
            if endpoints.total() == AT_ONCE:
                break
            if endpoints[one.endpoint_id] < _OF_ENDPOINT and tenants[one.tenant_id] < _OF_TENANT:
                endpoints[one.endpoint_id] += 1
                tenants[one.tenant_id] += 1
                chosen.append(one.id)
        return chosen

    def _deliver(self, delivery: WebhookDelivery, endpoint: WebhookEndpoint) -> None:
        started = time.monotonic()
        try:
            outcome = self._post(delivery, endpoint)
            self._record(delivery, endpoint, outcome, time.monotonic() - started)
        except Exception:
            # The lease ends, and it is sent again.
            log.exception("webhooks: an attempt to deliver %s to %s was lost", delivery.id, endpoint.id)
        finally:
            with self._claiming:
                self._endpoints[endpoint.id] -= 1
                self._tenants[endpoint.tenant_id] -= 1
        self.send_due()

    def _post(self, delivery: WebhookDelivery, endpoint: WebhookEndpoint) -> _Outcome:
        body = delivery.payload.encode()
        try:
            signed = signature.headers(self._keys(endpoint), delivery.id, int(time.time()), body)
            sent = {"Content-Type": "application/json", "User-Agent": "winnow-webhooks/1", **signed}
            answer = self._outbound.post(endpoint.url, sent, body)
        except Unsealable:
            return _Outcome(error="its secret cannot be read any more: the server's was changed; rotate it")
        except Refused as refused:
            return _Outcome(error=f"not sent: the URL {refused}")
        except Undelivered as error:
            return _Outcome(error=str(error))
        if 200 <= answer.status < 300:
            return _Outcome(answer.status)
        why = "redirects are not followed" if 300 <= answer.status < 400 else "only 2xx is taken for delivered"
        return _Outcome(answer.status, f"answered {answer.status}; {why}", answer.retry_after)

    def _keys(self, endpoint: WebhookEndpoint) -> list[bytes]:
        keys = [self._sealer.unseal(endpoint.sealed_secret)]
        until = endpoint.previous_secret_until
        if endpoint.sealed_previous_secret is not None and until is not None and datetime.now(UTC) < until:
            try:
                keys.append(self._sealer.unseal(endpoint.sealed_previous_secret))
            except Unsealable:  # rotated because of that
                log.warning("webhooks: the previous secret of %s cannot be read", endpoint.id)
        return keys

    def _record(self, delivery: WebhookDelivery, endpoint: WebhookEndpoint, outcome: _Outcome, seconds: float) -> None:
        is_gone = outcome.status == 410
        again = None if is_gone else _pause(delivery.attempts, outcome)
        with self._sessions.begin() as session:
            repository.record_attempt(
                session,
                delivery,
                status=outcome.status,
                seconds=seconds,
                error=outcome.error,
                again_seconds=again,
            )
            if is_gone and repository.disable(session, endpoint.id, "it answered 410 Gone"):
                repository.fail_unwanted(session, endpoint.id)
                audit.record_own(session, "system", endpoint.tenant_id, "webhook.disabled", endpoint.id)
        self._metrics.attempts.labels("failed" if outcome.error else "delivered").inc()
        if outcome.error is not None:
            log.info("webhooks: %s was not delivered to %s: %s", delivery.id, endpoint.id, outcome.error)


def _pause(attempts_before: int, outcome: _Outcome) -> float | None:
    """Seconds until the next attempt; None: there is none. Not before the endpoint asks for it, if that is within an hour."""
    if attempts_before >= len(SCHEDULE):
        return None
    pause = SCHEDULE[attempts_before] * random.uniform(1 - _JITTER, 1 + _JITTER)
    if outcome.status in (429, 503) and outcome.retry_after is not None:
        return max(pause, min(_seconds(outcome.retry_after), _LONGEST_RETRY_AFTER))
    return pause


def _seconds(retry_after: str) -> float:
    """Of the header `Retry-After`: a number or a date; 0 where it is neither."""
    if retry_after.isdecimal() and retry_after.isascii():
        return float(retry_after[:9])
    try:
        return (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0.0
