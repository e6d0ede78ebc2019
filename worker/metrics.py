"""What a worker counts, and the port where Prometheus reads it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    start_http_server,
)

from service.jobs.state import Stage

_SECONDS = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended: succeeded, reused, failed (with its code), released or lease_lost."""

    name: str
    code: str = ""


class PortTaken(Exception):
    """The metrics cannot be served; the message names the setting."""


class WorkerMetrics:
    """Counted whether or not they are served."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._units = Counter(
            "winnow_worker_units", "Attempts that ended", ["stage", "outcome", "code"], registry=self.registry
        )
        self._seconds = Histogram(
            "winnow_worker_unit_seconds",
            "From the claim to its outcome, of what was computed",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._running = Gauge("winnow_worker_units_running", "Units being done", ["stage"], registry=self.registry)
        self._samples = Counter("winnow_worker_samples", "Samples done", ["stage"], registry=self.registry)
        self.child_starts = Counter("winnow_worker_child_starts", "Compute processes started", registry=self.registry)
        self._child_deaths = Counter(
            "winnow_worker_child_deaths", "Compute processes that ended, by what", ["cause"], registry=self.registry
        )
        self.beats_missed = Counter(
            "winnow_worker_heartbeats_missed", "Heartbeats that did not reach the database", registry=self.registry
        )
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._stop_serving: Callable[[], None] = lambda: None

    def serve(self, host: str, port: int) -> None:
        """Answers Prometheus from now on, until `close`.

        Raises:
            PortTaken: the port cannot be had.
        """
        try:
            server, thread = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise PortTaken(
                f"WINNOW_WORKER__METRICS_PORT: port {port} of {host} cannot be had ({error.strerror}); each worker of a host"
                " needs its own."
            ) from error

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

    def samples_done(self, stage: Stage, count: int) -> None:
        self._samples.labels(stage.value).inc(max(0, count))

    def child_ended(self, cause: str) -> None:
        """`cause`: what it died of by itself (`exit`, a signal's name), or why it was ended (`stopped`, `other_model`)."""
        self._child_deaths.labels(cause).inc()
