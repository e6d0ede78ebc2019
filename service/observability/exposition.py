"""`/metrics`: what this process counts, and what the ledger holds at the moment of the scrape."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from sqlalchemy import Row
from sqlalchemy.exc import SQLAlchemyError

from service.database import make_engine, make_sessions
from service.dispatch import QUEUE
from service.jobs import repository
from service.jobs.state import TERMINAL, JobStatus
from service.observability.metrics import DispatchMetrics, HttpMetrics, WebhookMetrics
from service.settings import ApiSettings, DatabaseSettings

log = logging.getLogger(__name__)
router = APIRouter(tags=["health"])

_WAIT_SECONDS = 2.0
_CACHE_SECONDS = 4.0

# Of the ledger's gauges without labels: their help.
_PLAIN = {
    "units_claimable": "Units that a worker could take now",
    "oldest_claimable_unit_seconds": "How long the one that waits longest has waited",
    "leases_expired": "Units whose lease ran out and that nobody has taken back yet",
    "workers_alive": "Workers that told of themselves within a lease",
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was found; None stands for what did not answer."""

    gauges: Sequence[Row[Any]] | None
    messages: int | None
    free_bytes: int | None


class LedgerCollector(Collector):
    """Asks database and broker when it is scraped, on connections of its own, and not again for a few seconds."""

    def __init__(self, settings: ApiSettings, *, cache_seconds: float = _CACHE_SECONDS) -> None:
        self._settings = settings
        self._cache_seconds = cache_seconds
        self._engine = make_engine(DatabaseSettings(url=settings.database.url, pool_size=1))
        self._sessions = make_sessions(self._engine)
        self._thread = ThreadPoolExecutor(1, "metrics-ledger")
        self._lock = threading.Lock()
        self._asking: Future[Snapshot] | None = None
        self._asked = 0.0

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._engine.dispose()

    def collect(self) -> Iterable[GaugeMetricFamily]:
        found = self._snapshot()
        yield _gauge("database_up", "Whether the database answered", int(found.gauges is not None))
        yield _gauge("broker_up", "Whether the broker answered", int(found.messages is not None))
        if found.messages is not None:
            yield _gauge("broker_messages", "Messages that no worker has taken", found.messages)
        if found.free_bytes is not None:
            yield _gauge("artifacts_free_bytes", "Room left where the artifact store is", found.free_bytes)
        if found.gauges is not None:
            yield from _of_ledger(found.gauges)

    def _snapshot(self) -> Snapshot:
        """A fresh one, or one of a moment ago. One question at a time: while one hangs, no other joins it."""
        with self._lock:
            is_old = time.monotonic() - self._asked >= self._cache_seconds
            if self._asking is None or (self._asking.done() and is_old):
                self._asking, self._asked = self._thread.submit(self._ask), time.monotonic()
            asking = self._asking
        try:
            return asking.result(_WAIT_SECONDS)
        except TimeoutError:
            return Snapshot(gauges=None, messages=None, free_bytes=None)

    def _ask(self) -> Snapshot:
        return Snapshot(gauges=self._ask_ledger(), messages=self._ask_broker(), free_bytes=self._free_bytes())

    def _ask_ledger(self) -> Sequence[Row[Any]] | None:
        try:
            with self._sessions() as session:
                return repository.gauges(
                    session, alive_seconds=self._settings.ledger.lease_seconds, timeout_seconds=_WAIT_SECONDS
                )
        except SQLAlchemyError as error:
            log.warning("metrics: the database did not answer (%s)", type(error).__name__)
            return None

    def _ask_broker(self) -> int | None:
        url, seconds = self._settings.broker.url, _WAIT_SECONDS / 2
        try:
            with redis.Redis.from_url(url, socket_timeout=seconds, socket_connect_timeout=seconds) as client:
                return int(client.llen(QUEUE))
        except (redis.RedisError, OSError) as error:
            log.warning("metrics: the broker did not answer (%s)", type(error).__name__)
            return None

    def _free_bytes(self) -> int | None:
        """Of a store that is a folder; nothing is known of a remote one, or of one that nobody has written to."""
        folder = Path(self._settings.artifacts.url.removeprefix("file://"))
        if not folder.is_dir():
            return None
        stat = os.statvfs(folder)
        return stat.f_bavail * stat.f_frsize


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"winnow_{name}", text, value=value)


def _of_ledger(rows: Sequence[Row[Any]]) -> Iterable[GaugeMetricFamily]:
    jobs = GaugeMetricFamily("winnow_jobs", "Jobs that have not ended", labels=["status"])
    counts = {row.one: row.value for row in rows if row.gauge == "jobs"}
    for status in (status for status in JobStatus if status not in TERMINAL):
        jobs.add_metric([status.value], counts.get(status.value, 0))
    units = GaugeMetricFamily("winnow_units", "Units of jobs that have not ended", labels=["stage", "state"])
    for row in rows:
        if row.gauge == "units":
            units.add_metric([row.one, row.two], row.value)
    yield from (jobs, units)
    yield from (_gauge(row.gauge, _PLAIN[row.gauge], row.value) for row in rows if row.gauge in _PLAIN)


class ApiMetrics:
    """Everything that one application exports."""

    def __init__(self, settings: ApiSettings) -> None:
        self.registry = CollectorRegistry()
        self.http = HttpMetrics(self.registry)
        self.dispatch = DispatchMetrics(self.registry)
        self.webhooks = WebhookMetrics(self.registry)
        self._ledger = LedgerCollector(settings)
        self.registry.register(self._ledger)
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        # Not the pool that requests use: while the database is away they may hold all of it.
        self._thread = ThreadPoolExecutor(1, "metrics")

    async def render(self) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._thread, generate_latest, self.registry)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._ledger.close()


@router.get("/metrics", summary="Figures for Prometheus", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    figures: ApiMetrics = request.app.state.metrics
    return Response(await figures.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})
