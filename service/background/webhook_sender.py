"""The sender: posts deliveries that are due, in every API process, many at a time; acts at once on NOTIFY and on every sweep.

A delivery is claimed before it is sent, by a lease: a process that dies meanwhile costs a message that comes twice, never one
that does not come. No transaction is open during a request.
"""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from prometheus_client import CollectorRegistry
from standardwebhooks import Webhook

from service.audit import service as audit
from service.db.engine import make_engine, make_sessions
from service.db.loop import BackgroundLoop
from service.observability.api_metrics import WebhookMetrics
from service.settings import ApiSettings, DatabaseSettings
from service.storage.encryption import DecryptionError, Encryptor
from service.webhooks import repository
from service.webhooks.repository import Due
from service.webhooks.safe_http import Outbound, Refused, Undelivered
from service.webhooks.tables import WebhookDelivery, WebhookEndpoint

log = logging.getLogger(__name__)

# After each attempt that failed, the wait for the next: 24 hours in all. Receivers know these from Svix.
SCHEDULE = (5.0, 300.0, 1_800.0, 7_200.0, 18_000.0, 28_800.0, 28_800.0)
_JITTER = 0.1
_LONGEST_RETRY_AFTER = 3_600.0

# So that neither a slow endpoint nor a tenant with many holds up the others.
AT_ONCE = 32
_PER_TENANT = 8
_PER_ENDPOINT = 2

_SWEEP_SECONDS = 2.0
_SPARE_SECONDS = 30.0  # of a lease, beyond the request: for what is written before and after it


@dataclass(frozen=True, slots=True)
class _Outcome:
    """`error`: why it was not delivered, in words for the owner of the endpoint."""

    status: int | None = None
    error: str | None = None
    retry_after: str | None = None


class Sender(BackgroundLoop):
    """A thread that claims, and others that send."""

    name = "webhooks"
    channel = repository.CHANNEL

    def __init__(
        self, settings: ApiSettings, encryptor: Encryptor, outbound: Outbound, metrics: WebhookMetrics | None = None
    ) -> None:
        super().__init__(settings.database, retry_seconds=_SWEEP_SECONDS)
        self._lease_seconds = settings.webhooks.timeout_seconds + _SPARE_SECONDS
        self._encryptor = encryptor
        self._outbound = outbound
        self._metrics = metrics or WebhookMetrics(CollectorRegistry())
        self._posts = ThreadPoolExecutor(AT_ONCE, "webhook")
        self._claiming = threading.Lock()
        self._endpoints: Counter[str] = Counter()  # requests under way, by endpoint and by tenant
        self._tenants: Counter[str] = Counter()
        self._engine = make_engine(DatabaseSettings(url=settings.database.url, pool_size=2))
        self._sessions = make_sessions(self._engine)

    def stop(self) -> None:
        """Lets requests that are under way end, which they do within their timeout."""
        with self._claiming:
            self._stopping.set()
        super().stop()
        self._posts.shutdown()
        self._engine.dispose()

    def work(self, payloads: Sequence[str]) -> float:  # noqa: ARG002
        """Claims as many of what is due as may be under way, and hands them to threads. Each runs a pass when it is done."""
        with self._claiming:
            if self._stopping.is_set():
                return _SWEEP_SECONDS
            with self._sessions.begin() as session:
                repository.fail_unwanted(session)
                chosen = self._fair(repository.due(session, each=_PER_ENDPOINT))
                claimed = repository.claim(session, chosen, lease_seconds=self._lease_seconds) if chosen else []
            for delivery, endpoint in claimed:
                self._endpoints[endpoint.id] += 1
                self._tenants[endpoint.tenant_id] += 1
                self._posts.submit(self._deliver, delivery, endpoint)
        return _SWEEP_SECONDS

    def _fair(self, due: Iterable[Due]) -> list[str]:
        """Those of them for which there is a place, the longest waiting first."""
        endpoints, tenants, chosen = self._endpoints.copy(), self._tenants.copy(), []
        for one in due:
            if endpoints.total() == AT_ONCE:
                break
            if endpoints[one.endpoint_id] < _PER_ENDPOINT and tenants[one.tenant_id] < _PER_TENANT:
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
        self.run_pass()

    def _post(self, delivery: WebhookDelivery, endpoint: WebhookEndpoint) -> _Outcome:
        now = datetime.now(UTC)
        try:
            signatures = [Webhook(key).sign(delivery.id, now, delivery.payload) for key in self._keys(endpoint)]
            headers = {
                "Content-Type": "application/json",
                "User-Agent": "winnow-webhooks/1",
                "webhook-id": delivery.id,
                "webhook-timestamp": str(int(now.timestamp())),
                "webhook-signature": " ".join(signatures),  # any one of them suffices
            }
            answer = self._outbound.post(endpoint.url, headers, delivery.payload.encode())
        except DecryptionError:
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
        keys = [self._encryptor.decrypt(endpoint.sealed_secret)]
        until = endpoint.previous_secret_until
        if endpoint.sealed_previous_secret is not None and until is not None and datetime.now(UTC) < until:
            try:
                keys.append(self._encryptor.decrypt(endpoint.sealed_previous_secret))
            except DecryptionError:  # rotated because of that
                log.warning("webhooks: the previous secret of %s cannot be read", endpoint.id)
        return keys

    def _record(self, delivery: WebhookDelivery, endpoint: WebhookEndpoint, outcome: _Outcome, seconds: float) -> None:
        is_gone = outcome.status == 410
        retry_seconds = None if is_gone else _pause(delivery.attempts, outcome)
        with self._sessions.begin() as session:
            repository.record_attempt(
                session,
                delivery,
                status=outcome.status,
                seconds=seconds,
                error=outcome.error,
                again_seconds=retry_seconds,
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
