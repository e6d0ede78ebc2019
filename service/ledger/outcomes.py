"""Units and jobs that end: finished, failed, given back, cancelled."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from service.ledger.rows import (
    OPEN,
    Claim,
    Retries,
    add_event,
    cancel_units,
    claim_of,
    create_units,
    end_unit,
    in_seconds,
    is_current_claim,
    lock_claim,
    lock_job,
    running_units,
    unit_of,
    unit_results,
)
from service.ledger.state import JobStatus, UnitState
from service.ledger.tables import JobEvent, JobUnit, SelectionJob
from service.plan.artifact_keys import result_key
from service.plan.stages import UnitSpec


def finish_unit(session: Session, job: SelectionJob, claim: Claim, result: Mapping[str, Any]) -> bool:
    """Marks the locked claim succeeded. True where no unit of the job is left to do: then create the next, or end the job.

    `samples_done` of the result: how many samples it did, where it leaves the others of its total to further units.
    """
    did = result.get("samples_done", JobUnit.progress_total)
    end_unit(session, claim, UnitState.SUCCEEDED, result=dict(result), progress_done=did, progress_total=did)
    add_event(session, job.id, "unit.succeeded", **unit_of(claim), attempt=claim.attempt)
    if job.status == JobStatus.CANCELLING:
        _end_cancelling(session, job)
        return False
    unfinished = session.scalar(
        select(func.count()).where(JobUnit.job_id == job.id, JobUnit.state != UnitState.SUCCEEDED)
    )
    return unfinished == 0


def succeed_job(session: Session, job: SelectionJob) -> None:
    job.status = JobStatus.SUCCEEDED
    job.finished_at = func.clock_timestamp()
    add_event(session, job.id, "job.succeeded")


def fail_unit(session: Session, claim: Claim, error: Mapping[str, Any], *, retryable: bool, retries: Retries) -> bool:
    """Ends an attempt with its error: the unit goes back to pending, or fails its job. True where it will be retried.

    Raises:
        LeaseLost: the unit is no longer this worker's.
    """
    job = lock_claim(session, claim)
    return end_attempt(session, job, claim, dict(error), retryable=retryable, retries=retries)


def end_attempt(
    session: Session, job: SelectionJob, claim: Claim, error: dict[str, Any], *, retryable: bool, retries: Retries
) -> bool:
    failures = _count_failure(session, claim)
    retried = retryable and failures < retries.max_attempts and job.status != JobStatus.CANCELLING
    add_event(
        session, job.id, "unit.attempt_failed", **unit_of(claim), attempt=claim.attempt, error=error, retried=retried
    )
    if retried:
        end_unit(session, claim, UnitState.PENDING, error=error, not_before=in_seconds(retries.delay(failures)))
        return True
    if job.status == JobStatus.CANCELLING:
        end_unit(session, claim, UnitState.CANCELLED, error=error)
        _end_cancelling(session, job)
        return False
    end_unit(session, claim, UnitState.FAILED, error=error)
    _fail_job(session, job, claim, error)
    return False


def remake_artifact(session: Session, claim: Claim, error: Mapping[str, Any], *, retries: Retries) -> None:
    """Ends an attempt that found `error["artifact"]` missing or damaged: the unit of the job that made it is opened again, and
    this one waits for it. Fails the job where none made it (a dataset), or where it had to be made so often before.

    Raises:
        LeaseLost: the unit is no longer this worker's.
    """
    job = lock_claim(session, claim)
    key = error["artifact"]
    makers = [unit for unit in unit_results(session, job.id) if key in _made_by(unit)]
    maker = min(makers, key=lambda unit: unit.id, default=None)
    if maker is None or maker.id == claim.unit_id or job.status == JobStatus.CANCELLING:
        end_attempt(session, job, claim, dict(error), retryable=maker is not None, retries=retries)
        return
    if maker.state == UnitState.SUCCEEDED:
        if _count_reopened(session, maker) >= retries.max_attempts - 1:
            end_attempt(session, job, claim, dict(error), retryable=False, retries=retries)
            return
        # It keeps its result, which other units need, until it has the new one.
        maker.state, maker.finished_at = UnitState.PENDING, None
        add_event(
            session, job.id, "unit.reopened", **unit_of(claim_of(maker)), attempt=maker.attempt, error=dict(error)
        )
    end_unit(session, claim, UnitState.PENDING, waits_for=maker.id)
    reason = f"an artifact of {maker.stage} {maker.shard} is made again"
    add_event(session, job.id, "unit.released", **unit_of(claim), attempt=claim.attempt, reason=reason)


def _made_by(unit: JobUnit) -> set[str]:
    files = (unit.result or {}).get("files", ())
    return {unit.artifact_key, result_key(unit.artifact_key), *(file["key"] for file in files)}


def _count_reopened(session: Session, unit: JobUnit) -> int:
    reopened = select(func.count()).where(JobEvent.job_id == unit.job_id, JobEvent.type == "unit.reopened")
    return session.scalar(reopened.where(JobEvent.data.contains(unit_of(claim_of(unit))))) or 0


def _fail_job(session: Session, job: SelectionJob, claim: Claim, error: dict[str, Any]) -> None:
    """Ends the job with the error of its unit's last attempt, and the reasons of all of them."""
    job.error = {**error, **unit_of(claim), "attempts": claim.attempt, "history": _attempt_errors(session, claim)}
    job.status = JobStatus.FAILED
    job.finished_at = func.clock_timestamp()
    cancel_units(session, job.id, UnitState.PENDING, UnitState.RUNNING)
    add_event(session, job.id, "job.failed", error=job.error)


def _attempt_errors(session: Session, claim: Claim) -> list[dict[str, Any]]:
    """Why each failed attempt of the unit failed: {attempt, code, detail}, oldest first."""
    failed = session.scalars(
        select(JobEvent.data)
        .where(JobEvent.job_id == claim.job_id, JobEvent.type == "unit.attempt_failed")
        .where(JobEvent.data.contains(unit_of(claim)))
        .order_by(JobEvent.id)
    )
    return [{"attempt": data["attempt"], **data["error"]} for data in failed]


def _count_failure(session: Session, claim: Claim) -> int:
    counted = (
        update(JobUnit)
        .where(*is_current_claim(claim))
        .values(failures=JobUnit.failures + 1)
        .returning(JobUnit.failures)
    )
    return session.scalars(counted).one()


def start_waiting(session: Session, job_id: str, budget: int, first: Sequence[UnitSpec]) -> bool:
    """Gives its first units to a job that waited for datasets. False: it waits no longer, nothing was changed."""
    job = lock_job(session, job_id)
    if not job.awaits_datasets or job.status != JobStatus.QUEUED:
        return False
    job.budget, job.awaits_datasets = budget, False
    create_units(session, job_id, first, None)
    return True


def fail_waiting(session: Session, job_id: str, error: Mapping[str, Any]) -> bool:
    """Fails a job that waited for datasets. False: it waits no longer, nothing was changed."""
    job = lock_job(session, job_id)
    if not job.awaits_datasets or job.status != JobStatus.QUEUED:
        return False
    job.status, job.error, job.finished_at = JobStatus.FAILED, dict(error), func.clock_timestamp()
    add_event(session, job_id, "job.failed", error=job.error)
    return True


def release_unit(session: Session, claim: Claim, *, reason: str) -> None:
    """Gives a unit back unfinished (a worker that shuts down, a cancel that was seen). Not an attempt that failed.

    Raises:
        LeaseLost: the unit is no longer this worker's.
    """
    job = lock_claim(session, claim)
    if job.status == JobStatus.CANCELLING:
        end_unit(session, claim, UnitState.CANCELLED)
        add_event(session, job.id, "unit.cancelled", **unit_of(claim), attempt=claim.attempt)
        _end_cancelling(session, job)
        return
    end_unit(session, claim, UnitState.PENDING)
    add_event(session, job.id, "unit.released", **unit_of(claim), attempt=claim.attempt, reason=reason)


def request_cancel(session: Session, job: SelectionJob) -> bool:
    """Cancels the job: at once where no unit runs, else when the running units have stopped. False: it had ended."""
    job = lock_job(session, job.id)
    if job.status not in OPEN:
        return False
    job.cancel_requested_at = func.clock_timestamp()
    cancel_units(session, job.id, UnitState.PENDING)
    if job.status == JobStatus.RUNNING and running_units(session, job.id):
        job.status = JobStatus.CANCELLING
        add_event(session, job.id, "job.cancelling")
    else:
        finish_cancelled(session, job)
    return True


def _end_cancelling(session: Session, job: SelectionJob) -> None:
    if not running_units(session, job.id):
        finish_cancelled(session, job)


def finish_cancelled(session: Session, job: SelectionJob) -> None:
    job.status = JobStatus.CANCELLED
    job.finished_at = func.clock_timestamp()
    add_event(session, job.id, "job.cancelled")
