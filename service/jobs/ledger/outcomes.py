"""Units and jobs that end: finished, failed, given back, cancelled."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from service.jobs.ledger.rows import (
    OPEN,
    Claim,
    Retries,
    add_event,
    cancel_units,
    end_unit,
    held,
    in_seconds,
    lock_claim,
    lock_job,
    running_units,
    unit_of,
)
from service.jobs.state import JobStatus, UnitState
from service.jobs.tables import JobEvent, JobUnit, SelectionJob


def finish_unit(session: Session, job: SelectionJob, claim: Claim, result: Mapping[str, Any]) -> bool:
    """Marks the locked claim succeeded. True where no unit of the job is left to do: then create the next, or end the job."""
    end_unit(session, claim, UnitState.SUCCEEDED, result=dict(result), progress_done=JobUnit.progress_total)
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
    """Ends an attempt with its error: the unit goes back to pending, or fails its job. True where it will be tried again.

    Raises:
        LeaseLost: the unit is no longer this worker's.
    """
    job = lock_claim(session, claim)
    return end_attempt(session, job, claim, dict(error), retryable=retryable, retries=retries)


def end_attempt(
    session: Session, job: SelectionJob, claim: Claim, error: dict[str, Any], *, retryable: bool, retries: Retries
) -> bool:
    failures = _count_failure(session, claim)
    again = retryable and failures < retries.max_attempts and job.status != JobStatus.CANCELLING
    add_event(
        session, job.id, "unit.attempt_failed", **unit_of(claim), attempt=claim.attempt, error=error, retried=again
    )
    if again:
        end_unit(session, claim, UnitState.PENDING, error=error, not_before=in_seconds(retries.delay(failures)))
        return True
    if job.status == JobStatus.CANCELLING:
        end_unit(session, claim, UnitState.CANCELLED, error=error)
        _end_cancelling(session, job)
        return False
    end_unit(session, claim, UnitState.FAILED, error=error)
    _fail_job(session, job, claim, error)
    return False


def _fail_job(session: Session, job: SelectionJob, claim: Claim, error: dict[str, Any]) -> None:
    """Ends the job with the error of its unit's last attempt, and the reasons of all of them."""
    history = _attempt_errors(session, claim)
    job.status = JobStatus.FAILED
    job.error = {
        **error,
        "stage": claim.stage.value,
        "shard": claim.shard,
        "attempts": claim.attempt,
        "history": history,
    }
    job.finished_at = func.clock_timestamp()
    cancel_units(session, job.id, UnitState.PENDING, UnitState.RUNNING)
    add_event(session, job.id, "job.failed", error=job.error)


def _attempt_errors(session: Session, claim: Claim) -> list[dict[str, Any]]:
    """Why each failed attempt of the unit failed: {attempt, code, detail}, oldest first."""
    told = session.scalars(
        select(JobEvent.data)
        .where(JobEvent.job_id == claim.job_id, JobEvent.type == "unit.attempt_failed")
        .where(JobEvent.data.contains(unit_of(claim)))
        .order_by(JobEvent.id)
    )
    return [{"attempt": data["attempt"], **data["error"]} for data in told]


def _count_failure(session: Session, claim: Claim) -> int:
    counted = update(JobUnit).where(*held(claim)).values(failures=JobUnit.failures + 1).returning(JobUnit.failures)
    return session.scalars(counted).one()


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
