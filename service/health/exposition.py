"""`/metrics`: the counters of the API, and the state of the ledger at the moment of the scrape."""

import asyncio
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from sqlalchemy import Row
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from service.db.engine import make_engine
from service.health.checks import CheckResult, System, run_checks
from service.jobs import repository
from service.ledger.state import TERMINAL, JobStatus
from service.observability import processes
from service.observability.api_metrics import (
    DispatchMetrics,
    HttpMetrics,
    ShareMetrics,
    StorageMetrics,
    WebhookMetrics,
)
from service.settings import ApiSettings, DatabaseSettings
from service.shares import Shares

log = logging.getLogger(__name__)
router = APIRouter(tags=["health"])

_WAIT_SECONDS = 2.0
_CACHE_SECONDS = 4.0

_HELP = {  # of the gauges without labels
    "broker_messages": "Messages that no worker has received",
    "artifacts_free_bytes": "Free space on the disk of the artifact store",
    "units_claimable": "Units that a worker could claim now",
    "oldest_claimable_unit_seconds": "How long the oldest claimable unit has been waiting",
    "leases_expired": "Units whose lease has expired and has not been reclaimed yet",
    "workers_alive": "Workers with a heartbeat within the last lease",
    "workers_lacking": "Of these, the workers that leave some or all jobs to others, since they lack what those need",
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`ledger` is None, and a check is missing, if there was no answer in time."""

    ledger: Sequence[Row[Any]] | None
    checks: Mapping[str, CheckResult]


class LedgerCollector(Collector):
    """Reads database, broker and disk when it is scraped, on separate connections, at most once in a few seconds."""

    def __init__(self, settings: ApiSettings, *, cache_seconds: float = _CACHE_SECONDS) -> None:
        self._cache_seconds = cache_seconds
        self._engine = make_engine(DatabaseSettings(url=settings.database.url, pool_size=1))
        self._system = System(settings, self._engine, broker_timeout_seconds=_WAIT_SECONDS / 2)
        self._thread = ThreadPoolExecutor(1, "metrics-ledger")
        self._lock = threading.Lock()
        self._reading: Future[Snapshot] | None = None
        self._started = 0.0

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._engine.dispose()

    def collect(self) -> Iterable[GaugeMetricFamily]:
        found = self._snapshot()
        yield _gauge("database_up", "Whether the database answered", found.ledger is not None)
        yield _gauge("broker_up", "Whether the broker answered", "broker" in found.checks and found.checks["broker"].ok)
        for check in found.checks.values():
            yield from (_gauge(name, _HELP[name], value) for name, value in check.measurements.items())
        if found.ledger is not None:
            yield from _ledger_gauges(found.ledger)

    def _snapshot(self) -> Snapshot:
        """A new one, or the last one while it is recent. One read at a time: while one hangs, none is started beside it."""
        with self._lock:
            is_old = time.monotonic() - self._started >= self._cache_seconds
            if self._reading is None or (self._reading.done() and is_old):
                self._reading, self._started = self._thread.submit(self._read), time.monotonic()
            reading = self._reading
        try:
            return reading.result(_WAIT_SECONDS)
        except TimeoutError:
            return Snapshot(ledger=None, checks={})

    def _read(self) -> Snapshot:
        ledger = None
        try:
            with Session(self._engine) as session:
                alive_seconds = self._system.settings.ledger.lease_seconds
                ledger = repository.gauges(session, alive_seconds=alive_seconds, timeout_seconds=_WAIT_SECONDS)
        except SQLAlchemyError as error:
            log.warning("metrics: the database did not answer (%s)", type(error).__name__)
        checks = {result.name: result for result in run_checks(self._system, "broker", "disk")}
        if not checks["broker"].ok:
            log.warning("metrics: the broker did not answer (%s)", checks["broker"].error or checks["broker"].detail)
        return Snapshot(ledger, checks)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"winnow_{name}", text, value=value)


def _ledger_gauges(rows: Sequence[Row[Any]]) -> Iterable[GaugeMetricFamily]:
    jobs = GaugeMetricFamily("winnow_jobs", "Jobs that have not ended", labels=["status"])
    counts = {row.one: row.value for row in rows if row.gauge == "jobs"}
    for status in (status for status in JobStatus if status not in TERMINAL):
        jobs.add_metric([status.value], counts.get(status.value, 0))
    units = GaugeMetricFamily("winnow_units", "Units of jobs that have not ended", labels=["stage", "state"])
    for row in rows:
        if row.gauge == "units":
            units.add_metric([row.one, row.two], row.value)
    yield from (jobs, units)
    yield from (_gauge(row.gauge, _HELP[row.gauge], row.value) for row in rows if row.gauge in _HELP)


class ApiMetrics:
    """Everything that one application exports: of this process, or of all those that share a port with it."""

    def __init__(self, settings: ApiSettings, shares: Shares) -> None:
        folder = processes.shared_folder()
        self.registry = CollectorRegistry()
        own = self.registry if folder is None else CollectorRegistry()
        self.shares = ShareMetrics(own)
        for share in shares:
            share.on_change = self.shares.held.labels(share.name).set
            share.on_change(share.held)
        self.http = HttpMetrics(own)
        self.dispatch = DispatchMetrics(own)
        self.webhooks = WebhookMetrics(own)
        self.storage = StorageMetrics(own)
        self._ledger = LedgerCollector(settings)
        self.registry.register(self._ledger)
        if folder is None:
            ProcessCollector(registry=self.registry)
            GCCollector(registry=self.registry)
        else:
            self.registry.register(processes.AllProcesses(folder))
        # Not the pool that requests use: while the database is unavailable they may hold all of it.
        self._thread = ThreadPoolExecutor(1, "metrics")

    async def render(self) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._thread, generate_latest, self.registry)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._ledger.close()


@router.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    figures: ApiMetrics = request.app.state.metrics
    return Response(await figures.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})
