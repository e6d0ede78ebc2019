"""Claims tasks and has them done, one at a time, by a process that can be killed; writes how they end, fenced by the attempt."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from service import tasks
from service.db.engine import Sessions, is_away
from service.ledger import LeaseLost, Retries
from service.observability import logs
from service.settings import Settings
from service.storage.artifacts import ArtifactStore
from service.tasks import TaskClaim
from worker.errors import NOT_HERE, ComputeDied, KernelKilled, ModelNotHere, NotHere, UnitError
from worker.fitness import Fitness
from worker.metrics import Outcome, WorkerMetrics
from worker.process.compute_process import ComputeProcess
from worker.process.warm_process import POLL_SECONDS
from worker.tasks.kinds import KINDS, Kind

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_PROGRESS_SECONDS = 1.0
_MAIN = "worker.tasks.process"


class _Failed(Exception):
    def __init__(self, error: Mapping[str, Any], retryable: bool) -> None:
        super().__init__(error["detail"])
        self.error, self.retryable = error, retryable


class _Stopped(Exception):
    """The worker is shutting down."""


class TaskRunner:
    """Used by the supervisor's thread."""

    def __init__(
        self,
        settings: Settings,
        sessions: Sessions,
        store: ArtifactStore,
        worker_id: str,
        fitness: Fitness,
        metrics: WorkerMetrics,
        stopping: threading.Event,
        kinds: Mapping[str, Kind] = KINDS,
    ) -> None:
        self._settings, self._sessions, self._store = settings, sessions, store
        self._worker_id, self._fitness, self._metrics, self._stopping = worker_id, fitness, metrics, stopping
        chosen = settings.worker.tasks
        self._kinds = {name: kind for name, kind in kinds.items() if chosen is None or name in chosen}
        self._looked = float("-inf")
        self._kept: tuple[str, bool, ComputeProcess] | None = None

    def run_if_due(self) -> bool:
        """As `run_one`, but at most once a second: between the units of a busy worker."""
        return time.monotonic() - self._looked >= _LOOK_SECONDS and self.run_one()

    def run_one(self) -> bool:
        """Claims a task and does it, whatever its outcome is. False where there is none."""
        claim = self._claim()
        self._looked = time.monotonic()
        if claim is None:
            return False
        name = f"{claim.kind} {claim.task_id} for {claim.subject}"
        started = time.perf_counter()
        with logs.bound(task_id=claim.task_id, kind=claim.kind, attempt=claim.attempt):
            log.info("%s, attempt %d", name, claim.attempt)
            outcome = self._attempt(claim)
            seconds = time.perf_counter() - started
            log.info("%s: %s after %.1f s", name, f"{outcome.name} {outcome.code}".strip(), seconds)
        self._metrics.task_ended(claim.kind, outcome)
        self._looked = time.monotonic()
        return True

    def close(self) -> None:
        """Ends the process that was kept."""
        if self._kept is not None:
            self._kept[2].close(self._settings.worker.cancel_grace_seconds)
            self._kept = None

    def _claim(self) -> TaskClaim | None:
        if not self._kinds:
            return None
        try:
            with self._sessions.begin() as session:
                return tasks.claim_task(
                    session,
                    worker_id=self._worker_id,
                    lease_seconds=self._settings.ledger.lease_seconds,
                    kinds=list(self._kinds),
                    without=self._fitness.lacks,
                )
        except DBAPIError as error:
            if not is_away(error):
                raise
            log.warning("no task is claimed: the database is unavailable (%s)", type(error).__name__)
            return None

    def _attempt(self, claim: TaskClaim) -> Outcome:
        kind, model = self._kinds[claim.kind], claim.input.get("model")
        try:
            if model is not None:
                self._fitness.check(model)
            result = self._result(claim, kind)
            self._fitness.check_store()  # what was written must be where others find it
            self._settle(claim, lambda session: self._finish(session, claim, kind, result))
            return Outcome("succeeded")
        except LeaseLost:
            log.warning("the task was deleted, or its lease lost; its outcome is dropped")
            return Outcome("lease_lost")
        except _Stopped:
            return self._release(claim, "")
        except NotHere as error:
            return self._leave(claim, error)
        except _Failed as failed:
            return self._fail(claim, failed.error, failed.retryable)
        except ComputeDied as died:
            return self._fail(claim, _death(died), True)
        except UnitError as error:
            return self._fail(claim, error.as_dict(), error.retryable)
        except Exception as error:
            log.exception("%s", claim.task_id)
            return self._fail(claim, {"code": "internal_error", "detail": f"{type(error).__name__}: {error}"}, True)

    def _finish(self, session: Session, claim: TaskClaim, kind: Kind, result: Mapping[str, Any]) -> None:
        tasks.finish_task(session, claim, result)
        kind.finish(session, self._store, claim, result)

    def _fail(self, claim: TaskClaim, error: Mapping[str, Any], retryable: bool) -> Outcome:
        if error["code"] in NOT_HERE:
            return self._leave(claim, NOT_HERE[error["code"]](error["detail"]))
        ledger = self._settings.ledger
        retries = Retries(max_attempts=ledger.max_attempts, seconds=ledger.retry_seconds)
        return self._ended(
            claim,
            lambda session: tasks.fail_task(session, claim, error, retryable=retryable, retries=retries),
            Outcome("failed", str(error["code"])),
        )

    def _leave(self, claim: TaskClaim, lacking: NotHere) -> Outcome:
        """Gives the task to other workers, and takes none again for which the same is lacking."""
        if isinstance(lacking, ModelNotHere) and "model" in claim.input:
            self._fitness.lost_model(lacking, claim.input["model"])
        else:
            self._fitness.lost(lacking)
        return self._release(claim, lacking.code)

    def _release(self, claim: TaskClaim, code: str) -> Outcome:
        return self._ended(claim, lambda session: tasks.release_task(session, claim), Outcome("released", code))

    def _ended(self, claim: TaskClaim, write: Callable[[Session], object], outcome: Outcome) -> Outcome:
        try:
            self._settle(claim, write)
        except LeaseLost:
            return Outcome("lease_lost")
        return outcome

    def _settle(self, claim: TaskClaim, write: Callable[[Session], object]) -> None:
        """Writes the end in one transaction; retried while the database is unavailable and the lease may hold.

        Raises:
            LeaseLost: the task is no longer this worker's; or the database was away for too long, and the sweep ends the attempt.
        """
        deadline = time.monotonic() + self._settings.ledger.lease_seconds
        while True:
            try:
                with self._sessions.begin() as session:
                    write(session)
                return
            except DBAPIError as error:
                if not is_away(error):
                    raise
                if time.monotonic() > deadline or self._stopping.wait(_PROGRESS_SECONDS):
                    raise LeaseLost from error
                log.warning("the database is unavailable; the end of %s is written again", claim.task_id)

    def _result(self, claim: TaskClaim, kind: Kind) -> Mapping[str, Any]:
        """What the task's process answers.

        Raises:
            _Failed, ComputeDied: there is no result.
            LeaseLost, _Stopped: the result is no longer wanted.
        """
        process = self._process(claim, kind)
        context = {**logs.context(), "worker_id": self._worker_id}
        process.send(type="run", module=kind.module, input=claim.input, log=context)
        try:
            result = self._await_result(claim, process)
        except _Failed:
            self._keep_or_close(claim, kind, process)
            raise
        except BaseException:  # it may be doing anything: killing it is what a cancellation is
            self._kept = None
            process.stop(self._settings.worker.cancel_grace_seconds)
            self._store.remove_abandoned()  # what it was writing
            raise
        self._keep_or_close(claim, kind, process)
        return result

    def _process(self, claim: TaskClaim, kind: Kind) -> ComputeProcess:
        from_hub = kind.from_hub or _is_of_hub(claim.input.get("model"))
        if self._kept is not None:
            name, had_hub, process = self._kept
            if (name, had_hub) == (claim.kind, from_hub) and process.is_alive:
                return process
            self.close()
        return ComputeProcess(self._settings, from_hub=from_hub, module=_MAIN)

    def _keep_or_close(self, claim: TaskClaim, kind: Kind, process: ComputeProcess) -> None:
        if kind.keeps_process:
            self._kept = claim.kind, kind.from_hub or _is_of_hub(claim.input.get("model")), process
        else:
            process.close(self._settings.worker.cancel_grace_seconds)

    def _await_result(self, claim: TaskClaim, process: ComputeProcess) -> Mapping[str, Any]:
        """Waits for the answer; meanwhile renews the lease and writes progress."""
        progress: Mapping[str, Any] | None = None
        is_new = False
        tried = renewed = heard = time.monotonic()
        while True:
            message = process.receive(POLL_SECONDS)
            if message is not None:
                heard = time.monotonic()
                match message["type"]:
                    case "progress":
                        progress, is_new = message["done"], True
                    case "done":
                        return dict(message["result"])
                    case "failed":
                        raise _Failed(message["error"], message["retryable"])
            if self._stopping.is_set():
                raise _Stopped
            now = time.monotonic()
            if now - heard > self._settings.worker.stall_seconds:
                raise ComputeDied(f"The process sent nothing for {now - heard:.0f} seconds and was terminated.")
            if now - tried >= (_PROGRESS_SECONDS if is_new else self._settings.ledger.beat_seconds):
                tried = now
                if self._beat(claim, progress):
                    renewed, is_new = now, False
                elif now - renewed > self._settings.ledger.lease_seconds:
                    raise LeaseLost

    def _beat(self, claim: TaskClaim, progress: Mapping[str, Any] | None) -> bool:
        """Renews the lease; False while the database is unavailable.

        Raises:
            LeaseLost: another worker holds it, or it was deleted.
        """
        try:
            with self._sessions.begin() as session:
                tasks.beat(session, claim, lease_seconds=self._settings.ledger.lease_seconds, progress=progress)
        except DBAPIError:
            self._metrics.beats_missed.inc()
            log.warning("no heartbeat: the database is unavailable")
            return False
        return True


def _is_of_hub(model: Mapping[str, Any] | None) -> bool:
    """Of the model or the base of its adapter."""
    return model is not None and "hub" in (model["kind"], model.get("base", model)["kind"])


def _death(died: ComputeDied) -> dict[str, str]:
    """In the words of a task: it has no batches that could be halved."""
    if isinstance(died, KernelKilled):
        return {"code": died.code, "detail": "The kernel killed the process that did it: out of memory."}
    return {"code": "process_died", "detail": f"The process that did it ended before its time. {died.detail}"}
