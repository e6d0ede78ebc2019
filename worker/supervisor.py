"""The supervisor: claims a unit, has the compute process do it, sends heartbeats, cancels, and writes the outcome.

It holds the database credentials and imports no torch. Every write is fenced by the claim's attempt: after a lost lease the
work is dropped (or reused, since a finished artifact stays). No transaction is open while it reads the store or a network.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import service.tables  # noqa: F401  # every table must be known before one is mapped to its foreign keys
from service import ledger
from service.db.engine import is_away, make_engine, make_sessions
from service.ledger import Claim, LeaseLost, Retries
from service.ledger.workers import record_worker
from service.observability import logs
from service.observability.traces import Traces
from service.plan.versions import worker_version
from service.settings import Settings
from service.storage.artifacts import ArtifactStore
from service.storage.checksums import ArtifactDamaged
from worker.artifact_cache import known_result, mark_used
from worker.errors import NOT_HERE, ComputeDied, ModelNotHere, NotHere, UnitError, of_the_store
from worker.fitness import Fitness
from worker.heartbeat import Heartbeat
from worker.metrics import Outcome, WorkerMetrics
from worker.process.compute_process import ComputeProcess
from worker.process.warm_process import POLL_SECONDS, WarmProcess
from worker.tasks.runner import TaskRunner
from worker.units import Finish, Work, history

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_PROGRESS_SECONDS = 1.0


class _Stopped(Exception):
    """The unit is to be released: cancelled, or the worker is shutting down."""


class ReportedError(Exception):
    """The compute process reported that the unit failed: `error` is {code, detail}."""

    def __init__(self, error: dict[str, Any], retryable: bool) -> None:
        super().__init__(error["detail"])
        self.error, self.retryable = error, retryable


class Supervisor:
    """One per worker process; runs in one thread. `stop` may be called from any other."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # If it stopped in the middle of a write, it would hold the job's row beyond its lease.
        self._engine = make_engine(settings.database, idle_in_transaction_seconds=settings.ledger.lease_seconds)
        self._sessions = make_sessions(self._engine)
        self._store = ArtifactStore(settings.artifacts.url)
        self._stopping = threading.Event()
        self.worker_id = f"{socket.gethostname()}:{os.getpid()}"
        self._metrics = WorkerMetrics()
        self._compute = WarmProcess(settings, self._store, self._metrics)
        self._traces = Traces(settings.telemetry, "winnow-worker")
        probe = self._compute.probe if settings.worker.device == "cuda" else _no_probe
        self.fitness = Fitness(self._sessions, self._store, settings.models, probe=probe, changed=self._fitness_changed)
        self._tasks = TaskRunner(
            settings, self._sessions, self._store, self.worker_id, self.fitness, self._metrics, self._stopping
        )
        self._heartbeat = Heartbeat(self._sessions, self.worker_id, settings.ledger.beat_seconds, self.fitness.report)
        self._proving = threading.Thread(target=self._keep_proving, name="fitness", daemon=True)
        self._taking_work: Callable[[bool], None] = lambda _: None

    def start(self, taking_work: Callable[[bool], None] = lambda _: None) -> None:
        """Proves itself, serves metrics and writes heartbeats from now on, until `close`. `taking_work` is called with whether it
        takes work, where that changes.

        Raises:
            PortTaken: the port of the metrics is not available.
        """
        if self._settings.worker.metrics_port:
            host, port = self._settings.worker.metrics_host, self._settings.worker.metrics_port
            self._metrics.serve(host, port, lambda: self.fitness.problem)
        self._store.remove_abandoned()
        self._heartbeat.start()
        self._taking_work = taking_work
        self._proving.start()

    def _keep_proving(self) -> None:
        """That of the start, and later what is lacking; no failure of it may end it."""
        prove: Callable[[], object] = self.fitness.may_work
        while True:
            try:
                prove()
            except Exception:
                log.exception("the worker could not be proved fit")
            prove = self.fitness.prove_again
            if self._stopping.wait(self._settings.worker.prove_seconds):
                return

    def _fitness_changed(self) -> None:
        is_fit = self.fitness.problem is None
        self._metrics.fit.set(is_fit)
        self._metrics.lacks.set(len(self.fitness.lacks) - (not is_fit))
        self._heartbeat.beat()
        self._taking_work(is_fit)

    def stop(self) -> None:
        """Releases the running unit and makes `run_until_idle` return."""
        self._stopping.set()

    def close(self) -> None:
        """Ends the processes and the connections; after `run_until_idle` has returned."""
        self._stopping.set()
        if self._proving.is_alive():
            self._proving.join(timeout=5)
        self._compute.close()
        self._tasks.close()
        self._heartbeat.stop()
        self._engine.dispose()
        self._metrics.close()
        self._traces.close()

    def run_until_idle(self) -> int:
        """Does units, and tasks between them, until none may be claimed. Returns how many units."""
        count = 0
        while not self._stopping.is_set() and self.fitness.may_work():
            had_task = self._tasks.run_if_due()
            work = self._claim()
            if work is not None:
                self._do(work)
                count += 1
            elif not had_task and not self._tasks.run_one():
                break
        return count

    def _claim(self) -> Work | None:
        """None also while the database is unavailable: the dispatcher notifies workers once it is back."""
        try:
            with self._sessions.begin() as session:
                return Work.claimed(session, self.worker_id, self._settings.ledger, self.fitness.lacks)
        except DBAPIError as error:
            if not is_away(error):
                raise
            log.warning("nothing is claimed: the database is unavailable (%s)", type(error).__name__)
            return None

    def _do(self, work: Work) -> None:
        """Does one unit, logged, counted and traced; returns normally whatever its outcome is."""
        claim = work.claim
        stage, name = claim.stage.value, f"{claim.stage}/{claim.shard} of {claim.job_id}"
        unit = {"job_id": claim.job_id, "stage": stage, "shard": claim.shard, "attempt": claim.attempt}
        traced = {f"winnow.{key}": value for key, value in unit.items()}
        started = time.perf_counter()
        with (
            logs.bound(**unit),
            self._metrics.running(claim.stage),
            self._traces.span(f"unit {stage}", work.trace, traced) as note,
        ):
            log.info("%s, attempt %d", name, claim.attempt)
            outcome = self._attempt(work)
            seconds = time.perf_counter() - started
            note({"winnow.outcome": outcome.name, **({"error.type": outcome.code} if outcome.code else {})})
            fields = {"outcome": outcome.name, "code": outcome.code, "seconds": round(seconds, 3)}
            log.info("%s: %s after %.1f s", name, f"{outcome.name} {outcome.code}".strip(), seconds, extra=fields)
        self._metrics.unit_ended(claim.stage, outcome, seconds)

    def _attempt(self, work: Work) -> Outcome:
        """Does the unit and writes its outcome."""
        claim = work.claim
        self._store.on_damage = lambda key, reason: self._record_event(
            claim, "artifact.damaged", {"artifact": key, "reason": reason}
        )
        try:
            result = self._result(work)
            self._finish(work, result)
            return Outcome("reused" if result.get("reused") else "succeeded")
        except LeaseLost:
            log.warning("lost the lease on %s/%d of %s; its outcome is dropped", claim.stage, claim.shard, claim.job_id)
            return Outcome("lease_lost")
        except _Stopped as stopped:
            reason = str(stopped)
            self._settle(lambda session: ledger.release_unit(session, claim, reason=reason))
            return Outcome("released")
        except NotHere as error:
            return self._leave(work, error)
        except UnitError as error:
            return self._fail(work, error.as_dict(), error.retryable)
        except ReportedError as error:
            return self._fail(work, error.error, error.retryable)
        except (FileNotFoundError, ArtifactDamaged) as error:
            return self._fail(work, of_the_store(error).as_dict(), True)
        except Exception as error:
            log.exception("%s/%d of %s", claim.stage, claim.shard, claim.job_id)
            return self._fail(work, {"code": "internal_error", "detail": f"{type(error).__name__}: {error}"}, True)

    def _result(self, work: Work) -> dict[str, Any]:
        """The unit's result: the stored one if its artifact exists, else that of the compute process."""
        claim = work.claim
        if (known := known_result(self._store, claim.artifact_key)) is not None:
            return {**known, "reused": True}
        self.fitness.check(work.job.model)
        process = self._compute.holding(work.job.model)
        process.send(type="run", log={**logs.context(), "worker_id": self.worker_id}, **work.message())
        try:
            return self._await_result(claim, process)
        except (LeaseLost, _Stopped):
            self._compute.interrupt()
            raise
        except ReportedError:
            raise
        except ComputeDied as error:
            self._compute.drop()
            raise type(error)(f"{error.detail} {_place_of(claim)}") from error
        except Exception:  # it is still working: its answer must not be taken for that of the next unit
            self._compute.drop()
            raise

    def _await_result(self, claim: Claim, process: ComputeProcess) -> dict[str, Any]:
        """Waits for the answer of the process; meanwhile renews the lease and writes progress.

        Raises:
            ReportedError, ComputeDied: there is no result.
            LeaseLost, _Stopped: the result is no longer wanted.
        """
        done = written = 0
        tried = renewed = heard = time.monotonic()
        while True:
            message = process.receive(POLL_SECONDS)
            if message is not None:
                heard = time.monotonic()
                match message["type"]:
                    case "progress":
                        self._metrics.samples_done(claim.stage, message["done"] - done)
                        done = message["done"]
                    case "event":
                        self._record_event(claim, message["kind"], message["data"])
                    case "ready":
                        self._record_capability(message)
                    case "done":
                        result: dict[str, Any] = message["result"]
                        self._metrics.samples_done(claim.stage, max(0, result.get("samples_done", claim.total) - done))
                        return result
                    case "failed":
                        raise ReportedError(message["error"], message["retryable"])
            if self._stopping.is_set():
                raise _Stopped("the worker is shutting down")
            now = time.monotonic()
            if now - heard > self._settings.worker.stall_seconds:
                raise ComputeDied(f"The compute process sent nothing for {now - heard:.0f} seconds and was terminated.")
            if now - tried >= self._settings.ledger.beat_seconds or (
                done > written and now - tried >= _PROGRESS_SECONDS
            ):
                tried = now
                if self._beat(claim, done):
                    written, renewed = done, now
                elif now - renewed > self._settings.ledger.lease_seconds:
                    raise LeaseLost

    def _beat(self, claim: Claim, done: int) -> bool:
        """Renews the lease; False while the database is unavailable.

        Raises:
            LeaseLost: another worker holds it.
            _Stopped: the job is being cancelled.
        """
        try:
            with self._sessions.begin() as session:
                beat = ledger.beat(session, claim, lease_seconds=self._settings.ledger.lease_seconds, done=done)
        except DBAPIError:
            self._metrics.beats_missed.inc()
            log.warning("no heartbeat: the database is unavailable")
            return False
        if beat.cancelling:
            raise _Stopped("the job is being cancelled")
        return True

    def _record_event(self, claim: Claim, kind: str, data: dict[str, Any]) -> None:
        """Writes an event of the running unit; one that cannot be written is dropped: the next heartbeat finds out why."""
        if kind == "artifact.damaged":
            self._metrics.artifacts_damaged.inc()
        try:
            with self._sessions.begin() as session:
                ledger.record_event(session, claim, kind, data)
        except (LeaseLost, DBAPIError) as error:
            log.warning("the event %s was not written (%s)", kind, type(error).__name__)

    def _record_capability(self, ready: dict[str, Any]) -> None:
        """Writes what a new compute process measured of its device, for the estimates of later jobs."""
        try:
            with self._sessions.begin() as session:
                record_worker(
                    session,
                    self.worker_id,
                    worker_version(),
                    device=ready["device"],
                    memory_bytes=ready["memory_bytes"],
                    matmul_rates=ready["matmul_rates"],
                )
        except DBAPIError as error:
            log.warning("the worker's rates were not written (%s)", type(error).__name__)

    def _finish(self, work: Work, result: dict[str, Any]) -> None:
        """Reads what finishing the unit needs, and writes it in one fenced transaction."""
        done = self._with_db_retry(lambda session: history(session, work.claim.job_id)) if work.is_last else {}

        def read() -> Finish:
            self.fitness.check_store()  # what was written must be where others find it
            mark_used(self._store, work.claim.artifact_key, result)
            return Finish.read(self._store, self._settings.models, work, result, done)

        self._with_db_retry(self._while_beating(work.claim, read).write)

    def _while_beating(self, claim: Claim, read: Callable[[], _T]) -> _T:
        """What `read` returns. It may take longer than a lease lasts: the results of millions of samples, from a remote store."""
        with ThreadPoolExecutor(1, thread_name_prefix="finish") as executor:
            future = executor.submit(read)
            while wait([future], timeout=self._settings.ledger.beat_seconds).not_done:
                self._beat(claim, claim.total)
            return future.result()

    def _with_db_retry(self, work: Callable[[Session], _T]) -> _T:
        """The work in one transaction; retried while the database is unavailable and the lease may hold.

        Raises:
            LeaseLost: it was unavailable for too long, or the worker is shutting down.
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
                log.warning("the database is unavailable; retrying")

    def _fail(self, work: Work, error: dict[str, Any], retryable: bool) -> Outcome:
        """Ends the attempt; or gives the unit back, where this worker lacks something: that may be why it failed."""
        claim = work.claim
        try:
            self.fitness.check(work.job.model)
            if error["code"] in NOT_HERE:
                return self._leave(work, NOT_HERE[error["code"]](error["detail"]), is_of_job=True)
        except NotHere as lacking:
            return self._leave(work, lacking)
        except DBAPIError as away:
            log.warning("the worker's fitness is not known (%s)", type(away).__name__)
        retries = Retries(max_attempts=self._settings.ledger.max_attempts, seconds=self._settings.ledger.retry_seconds)
        if "artifact" in error:  # whoever made it makes it again
            self._settle(lambda session: ledger.remake_artifact(session, claim, error, retries=retries))
        else:
            self._settle(lambda session: ledger.fail_unit(session, claim, error, retryable=retryable, retries=retries))
        return Outcome("failed", str(error["code"]))

    def _leave(self, work: Work, lacking: NotHere, *, is_of_job: bool = False) -> Outcome:
        """Gives the unit back to other workers, and takes none again for which the same is lacking.

        `is_of_job`: the model is as it was posted, but not as the job began with it.
        """
        model = work.job.model
        if not isinstance(lacking, ModelNotHere):
            self._compute.drop()
            self.fitness.lost(lacking)
        elif is_of_job:
            self.fitness.lost_job(lacking, work.claim.job_id, model)
        else:
            self.fitness.lost_model(lacking, model)
        self._settle(lambda session: ledger.release_unit(session, work.claim, reason=lacking.detail))
        return Outcome("released", lacking.code)

    def _settle(self, change: Callable[[Session], object]) -> None:
        """Writes the end of an attempt; if that fails, the lease expires and the sweep does it."""
        try:
            with self._sessions.begin() as session:
                change(session)
        except (LeaseLost, DBAPIError) as error:
            log.warning("the end of an attempt was not written (%s); the sweep will", type(error).__name__)


def _no_probe() -> None:
    """A processor is always there."""


def _place_of(claim: Claim) -> str:
    """Where to look for a sample that makes the process die."""
    if "start" not in claim.spec:
        return f"It was processing {claim.stage}."
    return f"It was processing {claim.stage}, samples {claim.spec['start']} to {claim.spec['stop'] - 1} of the stage's input."
