"""The supervisor: claims a unit, has the compute child do it, beats, cancels, and writes what came of it.

It holds the database credentials and imports no torch. Every write is fenced by the claim's attempt: after a lost lease the
child's work is dropped (or found again, since a finished artifact stays).
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import service.schema  # noqa: F401  # every table must be known before one is mapped to its foreign keys
from service.artifacts import ArtifactStore
from service.database import is_away, make_engine, make_sessions
from service.jobs import ledger, repository
from service.jobs.ledger import Claim, LeaseLost, Retries
from service.jobs.state import JobStatus, Stage
from service.jobs.tables import SelectionJob
from service.observability import logs
from service.observability.traces import Traces
from service.results import repository as results
from service.settings import Settings
from worker import publish
from worker.child import Child
from worker.errors import ArtifactMissing, ComputeDied, UnitError
from worker.metrics import Outcome, WorkerMetrics
from worker.presence import Presence
from worker.reproduction import differences
from worker.reuse import known_result, mark_used
from worker.stages.keys import worker_version
from worker.units import exact_plan, next_units, unit_message, with_operations

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_POLL_SECONDS = 0.25
_PROGRESS_SECONDS = 1.0


class _Stopped(Exception):
    """The unit is to be given back: cancelled, or the worker shuts down."""


class ReportedError(Exception):
    """The child said that the unit failed: `error` is {code, detail}."""

    def __init__(self, error: dict[str, Any], retryable: bool) -> None:
        super().__init__(error["detail"])
        self.error, self.retryable = error, retryable


class Supervisor:
    """One per worker process; runs in one thread. `stop` may be called from any other."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Stopped in the midst of a write, it would hold the job's row beyond its lease.
        self._engine = make_engine(settings.database, idle_in_transaction_seconds=settings.ledger.lease_seconds)
        self._sessions = make_sessions(self._engine)
        self._store = ArtifactStore(settings.artifacts.url)
        self._stopping = threading.Event()
        self._child: Child | None = None
        self._child_model: Mapping[str, Any] | None = None
        self.worker_id = f"{socket.gethostname()}:{os.getpid()}"
        self._metrics = WorkerMetrics()
        self._traces = Traces(settings.telemetry, "winnow-worker")
        self._presence = Presence(self._sessions, self.worker_id, settings.ledger.beat_seconds)

    def start(self) -> None:
        """Tells of itself from now on, until `close`.

        Raises:
            PortTaken: there is to be a port for the metrics, and it cannot be had.
        """
        if self._settings.worker.metrics_port:
            self._metrics.serve(self._settings.worker.metrics_host, self._settings.worker.metrics_port)
        self._store.sweep_scratch()
        self._presence.start()

    def stop(self) -> None:
        """Makes the running unit be given back, and `drain` return."""
        self._stopping.set()

    def close(self) -> None:
        """Ends the child and the connections; after `drain` has returned."""
        if self._child is not None:
            self._child.close(self._settings.worker.cancel_grace_seconds)
            self._child = None
        self._presence.stop()
        self._engine.dispose()
        self._metrics.close()
        self._traces.close()

    def drain(self) -> int:
        """Does units until none may be claimed. Returns how many."""
        count = 0
        while not self._stopping.is_set():
            claim = self._claim()
            if claim is None:
                break
            self._do(claim)
            count += 1
        return count

    def _claim(self) -> Claim | None:
        """None also where the database is away: the dispatcher sends word once it is back."""
        settings = self._settings.ledger
        try:
            with self._sessions.begin() as session:
                return ledger.claim_unit(
                    session,
                    worker_id=self.worker_id,
                    lease_seconds=settings.lease_seconds,
                    code=worker_version(),
                    turn_seconds=settings.turn_seconds,
                )
        except DBAPIError as error:
            if not is_away(error):
                raise
            log.warning("nothing is claimed: the database is away (%s)", type(error).__name__)
            return None

    def _do(self, claim: Claim) -> None:
        """Does one unit, logged, counted and traced; returns normally whatever its outcome is."""
        stage, what = claim.stage.value, f"{claim.stage}/{claim.shard} of {claim.job_id}"
        unit = {"job_id": claim.job_id, "stage": stage, "shard": claim.shard, "attempt": claim.attempt}
        traced = {f"winnow.{name}": value for name, value in unit.items()}
        started = time.perf_counter()
        with (
            logs.bound(**unit),
            self._metrics.running(claim.stage),
            self._traces.span(f"unit {stage}", self._trace_of(claim), traced) as note,
        ):
            log.info("%s, attempt %d", what, claim.attempt)
            outcome = self._attempt(claim)
            seconds = time.perf_counter() - started
            note({"winnow.outcome": outcome.name, **({"error.type": outcome.code} if outcome.code else {})})
            told = {"outcome": outcome.name, "code": outcome.code, "seconds": round(seconds, 3)}
            log.info("%s: %s after %.1f s", what, f"{outcome.name} {outcome.code}".strip(), seconds, extra=told)
        self._metrics.unit_ended(claim.stage, outcome, seconds)

    def _trace_of(self, claim: Claim) -> str | None:
        """Where the unit's span belongs; None, which begins a trace of its own, where the database does not say."""
        if not self._traces.are_made:
            return None
        try:
            with self._sessions() as session:
                return repository.trace(session, claim.job_id)
        except DBAPIError as error:
            log.warning("the trace of the job was not read (%s)", type(error).__name__)
            return None

    def _attempt(self, claim: Claim) -> Outcome:
        """Does the unit and writes its outcome."""
        try:
            if claim.stage == Stage.PUBLISH:
                self._write(claim, lambda session, job: self._publish(session, job, claim))
                return Outcome("succeeded")
            result = self._compute(claim)
            mark_used(self._store, claim.artifact_key, result)
            self._write(claim, lambda session, job: self._finish(session, job, claim, result))
            return Outcome("reused" if result.get("reused") else "succeeded")
        except LeaseLost:
            log.warning("lost the lease on %s/%d of %s; its outcome is dropped", claim.stage, claim.shard, claim.job_id)
            return Outcome("lease_lost")
        except _Stopped as stopped:
            reason = str(stopped)
            self._settle(lambda session: ledger.release_unit(session, claim, reason=reason))
            return Outcome("released")
        except UnitError as error:
            return self._fail(claim, error.as_dict(), error.retryable)
        except ReportedError as error:
            return self._fail(claim, error.error, error.retryable)
        except FileNotFoundError as error:
            missing = ArtifactMissing.named(error)
            return self._fail(claim, missing.as_dict(), missing.retryable)
        except Exception as error:
            log.exception("%s/%d of %s", claim.stage, claim.shard, claim.job_id)
            return self._fail(claim, {"code": "internal_error", "detail": f"{type(error).__name__}: {error}"}, True)

    def _fail(self, claim: Claim, error: dict[str, Any], retryable: bool) -> Outcome:
        retries = Retries(max_attempts=self._settings.ledger.max_attempts, seconds=self._settings.ledger.retry_seconds)
        self._settle(lambda session: ledger.fail_unit(session, claim, error, retryable=retryable, retries=retries))
        return Outcome("failed", str(error["code"]))

    def _settle(self, change: Callable[[Session], object]) -> None:
        """Writes the end of an attempt; where that cannot be, the lease runs out and the sweep does it."""
        try:
            with self._sessions.begin() as session:
                change(session)
        except (LeaseLost, DBAPIError) as error:
            log.warning("the end of an attempt was not written (%s); the sweep will see to it", type(error).__name__)

    def _write(self, claim: Claim, change: Callable[[Session, SelectionJob], None]) -> None:
        """Writes a finished unit in one fenced transaction."""
        self._patiently(lambda session: change(session, ledger.lock_claim(session, claim)))

    def _patiently(self, work: Callable[[Session], _T]) -> _T:
        """The work in one transaction; tried again while the database is away and the lease may hold.

        Raises:
            LeaseLost: it was away for too long, or the worker is to end.
        """
        deadline = time.monotonic() + self._settings.ledger.lease_seconds
        while True:
            try:
                with self._sessions.begin() as session:
                    return work(session)
            except DBAPIError as error:
                if not is_away(error):
                    raise
                if time.monotonic() > deadline or self._stopping.wait(_PROGRESS_SECONDS):
                    raise LeaseLost from error
                log.warning("the database is away; trying again")

    def _compute(self, claim: Claim) -> dict[str, Any]:
        """The unit's result: the one that stands beside its artifact already, or that of the child's work."""
        if (known := known_result(self._store, claim.artifact_key)) is not None:
            return {**known, "reused": True}
        message = self._patiently(lambda session: unit_message(session, claim))
        child = self._child_for(message["job"]["model"])
        child.send(type="run", log={**logs.context(), "worker_id": self.worker_id}, **message)
        try:
            return self._attend(claim, child)
        except (ReportedError, LeaseLost, _Stopped):
            raise  # the child has answered or was stopped
        except ComputeDied as error:
            self._drop(child)
            raise type(error)(f"{error.detail} {_place_of(claim)}") from error
        except Exception:  # it still works on what nobody waits for: its answer must not meet the next unit
            self._drop(child)
            raise

    def _child_for(self, model: Mapping[str, Any]) -> Child:
        """The warm child, or a fresh one where there is none or it holds another model."""
        if self._child is not None and (not self._child.is_alive or self._child_model != model):
            self._metrics.child_ended(self._child.death or "other_model")
            self._child.close(self._settings.worker.cancel_grace_seconds)
            self._child = None
        if self._child is None:
            from_hub = "hub" in (model["kind"], model.get("base", model)["kind"])
            self._child, self._child_model = Child(self._settings, from_hub=from_hub), model
            self._metrics.child_starts.inc()
        return self._child

    def _attend(self, claim: Claim, child: Child) -> dict[str, Any]:
        """Waits for the child's answer; beats and writes progress meanwhile, and passes a cancel on."""
        done = written = 0
        tried = renewed = heard = time.monotonic()
        while True:
            message = child.receive(_POLL_SECONDS)
            if message is not None:
                heard = time.monotonic()
                match message["type"]:
                    case "progress":
                        self._metrics.samples_done(claim.stage, message["done"] - done)
                        done = message["done"]
                    case "event":
                        self._tell(claim, message["kind"], message["data"])
                    case "ready":
                        self._register(message)
                    case "done":
                        self._metrics.samples_done(claim.stage, claim.total - done)
                        return dict(message["result"])
                    case "failed":
                        raise ReportedError(message["error"], message["retryable"])
            if self._stopping.is_set():
                self._stop_child(child)
                raise _Stopped("the worker shuts down")
            now = time.monotonic()
            if now - heard > self._settings.worker.stall_seconds:
                raise ComputeDied(f"The compute process said nothing for {now - heard:.0f} seconds, and was ended.")
            if now - tried >= self._settings.ledger.beat_seconds or (
                done > written and now - tried >= _PROGRESS_SECONDS
            ):
                tried = now
                if self._beat(claim, child, done):
                    written, renewed = done, now
                elif now - renewed > self._settings.ledger.lease_seconds:
                    self._stop_child(child)
                    raise LeaseLost

    def _tell(self, claim: Claim, kind: str, data: dict[str, Any]) -> None:
        """Writes an event of the running unit; one that cannot be written is dropped, for the beat to find out why."""
        try:
            with self._sessions.begin() as session:
                ledger.record_event(session, claim, kind, data)
        except (LeaseLost, DBAPIError) as error:
            log.warning("the event %s was not written (%s)", kind, type(error).__name__)

    def _register(self, ready: dict[str, Any]) -> None:
        """Writes what the fresh child measured of its device, for the estimates of later jobs."""
        try:
            with self._sessions.begin() as session:
                repository.record_worker(
                    session,
                    worker_id=self.worker_id,
                    device=ready["device"],
                    memory_bytes=ready["memory_bytes"],
                    matmul_rates=ready["matmul_rates"],
                )
        except DBAPIError as error:
            log.warning("the worker's rates were not written (%s)", type(error).__name__)

    def _beat(self, claim: Claim, child: Child, done: int) -> bool:
        """Renews the lease; False where the database is away.

        Raises:
            LeaseLost: it is another's by now.
            _Stopped: the job is being cancelled.
        """
        try:
            with self._sessions.begin() as session:
                beat = ledger.beat(session, claim, lease_seconds=self._settings.ledger.lease_seconds, done=done)
        except LeaseLost:
            self._stop_child(child)
            raise
        except DBAPIError:
            self._metrics.beats_missed.inc()
            log.warning("no heartbeat: the database is away")
            return False
        if beat.cancelling:
            self._stop_child(child)
            raise _Stopped("the job is being cancelled")
        return True

    def _stop_child(self, child: Child) -> None:
        """Tells the child to stop at its next batch and keeps it warm; ends it where it does not heed that."""
        child.send(type="cancel")
        deadline = time.monotonic() + self._settings.worker.cancel_grace_seconds
        try:
            while time.monotonic() < deadline:
                message = child.receive(_POLL_SECONDS)
                if message is not None and message["type"] in ("done", "failed", "cancelled"):
                    return
        except ComputeDied:
            pass
        self._drop(child)

    def _drop(self, child: Child) -> None:
        self._metrics.child_ended(child.death or "stopped")
        child.stop(self._settings.worker.cancel_grace_seconds)
        self._child = None
        self._store.sweep_scratch()  # what it was writing

    def _publish(self, session: Session, job: SelectionJob, claim: Claim) -> None:
        if job.status == JobStatus.CANCELLING:
            raise _Stopped("the job is being cancelled")
        publish.publish(session, self._store, job)
        ledger.finish_unit(session, job, claim, {})
        ledger.succeed_job(session, job)

    def _finish(self, session: Session, job: SelectionJob, claim: Claim, result: dict[str, Any]) -> None:
        if not ledger.finish_unit(session, job, claim, with_operations(session, claim, result)):
            return
        units = next_units(session, job)
        if claim.stage == Stage.PREPARE:
            if job.reproduces is not None:
                record = results.provenance(session, job.reproduces).record
                ledger.add_event(session, job.id, "job.reproduction", differences=differences(record, result))
            planned = exact_plan(session, self._store, self._settings.models, job, units)
            ledger.add_event(session, job.id, "job.planned", **planned)
        ledger.start_stages(session, job, units, code=worker_version())


def _place_of(claim: Claim) -> str:
    """Where to look for a sample that the process dies of."""
    if "start" not in claim.spec:
        return f"It was at {claim.stage}."
    return f"It was at {claim.stage}, samples {claim.spec['start']} to {claim.spec['stop'] - 1} of those that the stage reads."
