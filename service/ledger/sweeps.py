"""What the dispatcher and the sweeper do: expired leases, overdue cancels, deleted jobs, artifacts locked."""

from datetime import timedelta

from sqlalchemy import and_, delete, func, select
from sqlalchemy.orm import Session

from service.db.locks import Lock, advisory_lock
from service.ledger.outcomes import end_attempt, finish_cancelled
from service.ledger.rows import (
    NotTerminal,
    Retries,
    cancel_units,
    claim_of,
    is_current_claim,
    lock_job,
    lock_job_if_free,
)
from service.ledger.state import TERMINAL, JobStatus, UnitState
from service.ledger.tables import JobEvent, JobUnit, SelectionJob


def expire_leases(session: Session, *, retries: Retries) -> int:
    """Returns the units whose lease ran out to pending, or fails their job after the last attempt. Returns how many.

    A job or a unit whose row someone holds is left for the next time: one that stands still must not hold up all others.
    """
    expired = session.scalars(
        select(JobUnit)
        # Not clock_timestamp(), for which no index is used: the lease of every running unit would be looked at.
        .where(JobUnit.state == UnitState.RUNNING, JobUnit.lease_expires_at < func.statement_timestamp())
        .order_by(JobUnit.id)  # so that which of its units fails a job is deterministic
    ).all()
    count = 0
    for unit in expired:
        claim = claim_of(unit)
        job = lock_job_if_free(session, claim.job_id)
        still_expired = and_(*is_current_claim(claim), JobUnit.lease_expires_at < func.clock_timestamp())
        if job is None or not session.scalar(select(JobUnit.id).where(still_expired).with_for_update(skip_locked=True)):
            continue  # it beats just now, or it beat or ended while the job's row was being locked
        error = {
            "code": "lease_expired",
            "detail": f"Worker {unit.worker_id} stopped answering (killed, cut off, or out of memory).",
        }
        # A lease was wait enough: the next attempt is at once.
        at_once = Retries(max_attempts=retries.max_attempts, seconds=0)
        end_attempt(session, job, claim, error, retryable=True, retries=at_once)
        count += 1
    return count


def expire_cancels(session: Session, *, after_seconds: float) -> int:
    """Carries through, without their workers, the cancels asked for so long ago. A worker that still computes is fenced off."""
    asked_before = func.statement_timestamp() - timedelta(seconds=after_seconds)
    overdue = session.scalars(
        select(SelectionJob)
        # One of them is not deleted, and the index of those looks up this status tenant by tenant, not all open jobs.
        .where(SelectionJob.status == JobStatus.CANCELLING, SelectionJob.deleted_at.is_(None))
        .where(SelectionJob.cancel_requested_at < asked_before)
        .with_for_update(key_share=True, skip_locked=True)
        .execution_options(populate_existing=True)
    ).all()
    for job in overdue:
        cancel_units(session, job.id, UnitState.RUNNING, reason="the workers did not stop in time")
        finish_cancelled(session, job)
    return len(overdue)


def delete_job(session: Session, job: SelectionJob) -> bool:
    """Deletes what a finished job has left but for its own row and its provenance. True; False where that was done before.

    Raises:
        NotTerminal: the job has not ended.
    """
    job = lock_job(session, job.id)
    if job.status not in TERMINAL:
        raise NotTerminal
    if job.deleted_at is not None:
        return False
    job.deleted_at = func.clock_timestamp()
    job.job_metadata = {}
    job.name, job.labels, job.folded_name, job.terms = None, {}, None, None
    for table in (JobUnit, JobEvent):
        session.execute(delete(table).where(table.job_id == job.id))
    return True


def lock_artifacts(session: Session) -> None:
    """Until the transaction ends, no unit is created: what none refers to now, none will."""
    advisory_lock(session, Lock.ARTIFACTS)
