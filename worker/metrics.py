"""A worker's metrics, and the port where Prometheus reads them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    start_http_server,
)

from service.plan.stages import Stage

_SECONDS = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended: succeeded, reused, failed (with its code), released or lease_lost."""

    name: str
    code: str = ""


class PortTaken(Exception):
    """The metrics cannot be served; the message names the setting."""


class WorkerMetrics:
    """They are counted whether or not they are served."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._units = Counter(
            "winnow_worker_units", "Attempts that ended", ["stage", "outcome", "code"], registry=self.registry
        )
        self._seconds = Histogram(
            "winnow_worker_unit_seconds",
            "From the claim of a unit to its result",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._running = Gauge("winnow_worker_units_running", "Units in progress", ["stage"], registry=self.registry)
        self._samples = Counter("winnow_worker_samples", "Samples done", ["stage"], registry=self.registry)
        self._tasks = Counter(
            "winnow_worker_tasks", "Attempts at tasks that ended", ["kind", "outcome", "code"], registry=self.registry
        )
        self.child_starts = Counter("winnow_worker_child_starts", "Compute processes started", registry=self.registry)
        self._child_deaths = Counter(
            "winnow_worker_child_deaths", "Compute processes that ended, by cause", ["cause"], registry=self.registry
        )
        self.beats_missed = Counter(
            "winnow_worker_heartbeats_missed", "Heartbeats that failed to reach the database", registry=self.registry
        )
        self.artifacts_damaged = Counter(
            "winnow_worker_artifacts_damaged",
            "Artifacts that were found damaged and set aside",
            registry=self.registry,
        )
        self.fit = Gauge("winnow_worker_fit", "Whether the worker takes work at all", registry=self.registry)
        self.lacks = Gauge("winnow_worker_lacks", "Models and jobs that it leaves to others", registry=self.registry)
        self.fit.set(1)
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._stop_serving: Callable[[], None] = lambda: None

    def serve(self, host: str, port: int, problem: Callable[[], str | None]) -> None:
        """Serves the metrics until `close`; and on /readyz whether there is no `problem`, with status 200 or 503.

        Raises:
            PortTaken: the port is not available.
        """
        try:
            server, thread = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise PortTaken(
                f"WINNOW_WORKER__METRICS_PORT: port {port} of {host} is not available ({error.strerror}); each worker on a"
                " host needs its own."
            ) from error

        metrics: Any = server.get_app()

        def answer(environ: dict[str, Any], start_response: Any) -> Any:
            if environ["PATH_INFO"] != "/readyz":
                return metrics(environ, start_response)
            found = problem()
            status = "200 OK" if found is None else "503 Service Unavailable"
            start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
            return [(found or "ok").encode()]

        server.set_app(answer)

        def stop() -> None:
            server.shutdown()
            thread.join(timeout=5)
            server.server_close()

        self._stop_serving = stop

    def close(self) -> None:
        self._stop_serving()

    @contextmanager
    def running(self, stage: Stage) -> Iterator[None]:
        with self._running.labels(stage.value).track_inprogress():
            yield

    def unit_ended(self, stage: Stage, outcome: Outcome, seconds: float) -> None:
        self._units.labels(stage.value, outcome.name, outcome.code).inc()
        if outcome.name == "succeeded":
            self._seconds.labels(stage.value).observe(seconds)

    def task_ended(self, kind: str, outcome: Outcome) -> None:
        self._tasks.labels(kind, outcome.name, outcome.code).inc()

    def samples_done(self, stage: Stage, count: int) -> None:
        self._samples.labels(stage.value).inc(max(0, count))

    def child_ended(self, cause: str) -> None:
        """`cause`: how it died (`exit`, a signal's name), or why it was ended (`stopped`, `other_model`)."""
        self._child_deaths.labels(cause).inc()
