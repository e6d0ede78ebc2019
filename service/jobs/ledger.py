"""The job ledger: every state change of jobs and units, in SQL, fenced by `attempt`.

Order of locks, always: the job row, then its units. A claim holds for a lease; a worker that stops beating loses it, and
none of its later writes takes effect. Every change writes its event in the same transaction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, exists, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased

from service.jobs.state import JobStatus, Stage, UnitState
from service.jobs.tables import JobEvent, JobUnit, SelectionJob

_OPEN = (JobStatus.QUEUED, JobStatus.RUNNING)  # what a unit may be claimed of


class LeaseLost(Exception):
    """The unit is no longer this worker's: its lease expired, or the job ended. Nothing was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSpec:
    """A unit to create: `spec` is what the compute child needs, `total` counts what its progress counts (samples)."""

    stage: Stage
    shard: int
    artifact_key: str
    spec: Mapping[str, Any]
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A unit under a lease. `attempt` goes with every write."""

    unit_id: int
    job_id: str
    attempt: int
    stage: Stage
    shard: int
    artifact_key: str
    spec: dict[str, Any]
    total: int


@dataclass(frozen=True, slots=True)
class Beat:
    """What a heartbeat learned: whether the job is being cancelled."""

    cancelling: bool


def add_event(session: Session, job_id: str, kind: str, **data: Any) -> None:
    session.add(JobEvent(job_id=job_id, type=kind, data=data))


def create_job(session: Session, job: SelectionJob, first: Sequence[UnitSpec]) -> None:
    """Adds the job, its first units and its first event to the session's transaction."""
    session.add(job)
    session.flush()
    add_event(session, job.id, "job.queued")
    _create_units(session, job.id, first)


def _create_units(session: Session, job_id: str, specs: Sequence[UnitSpec]) -> None:
    session.add_all(
        JobUnit(
            job_id=job_id,
            stage=spec.stage,
            shard=spec.shard,
            artifact_key=spec.artifact_key,
            spec=dict(spec.spec),
            state=UnitState.PENDING,
            progress_total=spec.total,
        )
        for spec in specs
    )
    session.flush()


def claim_unit(session: Session, *, worker_id: str, lease_seconds: float) -> Claim | None:
    """Takes the first unit that may run, or None. Oldest job first, then in the order of stages and shards.

    A unit whose artifact is being made by another unit waits for that one. Commit at once: the claim holds a job's row.
    """
    while (candidate := _claimable_unit(session)) is not None:
        unit_id, job_id = candidate
        # Rolled back where another was first: two claims that each kept the row of a job they missed could deadlock.
        attempt = session.begin_nested()
        job = _lock_job(session, job_id)
        claim = _take(session, unit_id, worker_id, lease_seconds) if job.status in _OPEN else None
        if claim is None:
            attempt.rollback()
            continue
        attempt.commit()
        if job.status == JobStatus.QUEUED:
            job.status = JobStatus.RUNNING
            job.started_at = func.now()
            add_event(session, job_id, "job.running")
        add_event(session, job_id, "unit.claimed", **_unit_of(claim), attempt=claim.attempt, worker_id=worker_id)
        return claim
    return None


def _is_claimable() -> tuple[ColumnElement[bool], ...]:
    """Of a unit joined to its job: that a worker may take it now."""
    other = aliased(JobUnit)
    being_made = exists().where(other.artifact_key == JobUnit.artifact_key, other.state == UnitState.RUNNING)
    return SelectionJob.status.in_(_OPEN), JobUnit.state == UnitState.PENDING, ~being_made


def _claimable_unit(session: Session) -> tuple[int, str] | None:
    row = session.execute(
        select(JobUnit.id, JobUnit.job_id)
        .join(SelectionJob, SelectionJob.id == JobUnit.job_id)
        .where(*_is_claimable())
        .order_by(SelectionJob.created_at, SelectionJob.id, JobUnit.stage, JobUnit.shard)
        .limit(1)
    ).one_or_none()
    return None if row is None else (row.id, row.job_id)


def _take(session: Session, unit_id: int, worker_id: str, lease_seconds: float) -> Claim | None:
    """The conditional UPDATE of a claim; None where another worker was first with this unit or with its artifact."""
    taken = (
        update(JobUnit)
        .where(JobUnit.id == unit_id, JobUnit.state == UnitState.PENDING)
        .values(
            state=UnitState.RUNNING,
            attempt=JobUnit.attempt + 1,
            worker_id=worker_id,
            lease_expires_at=_in_seconds(lease_seconds),
            started_at=func.clock_timestamp(),
            progress_done=0,
        )
        .returning(JobUnit)
        .execution_options(populate_existing=True)
    )
    try:
        with session.begin_nested():
            unit = session.scalars(taken).one_or_none()
    except IntegrityError:  # uq_job_units_artifact_key_running: the same artifact was claimed for another job just now
        return None
    if unit is None:
        return None
    return _claim_of(unit)


def beat(session: Session, claim: Claim, *, lease_seconds: float, done: int) -> Beat:
    """Renews the lease and writes the progress, which never goes back within an attempt.

    Raises:
        LeaseLost: the unit is no longer this worker's.
    """
    renewed = session.execute(
        update(JobUnit)
        .where(*_held(claim))
        .values(
            lease_expires_at=_in_seconds(lease_seconds),
            progress_done=func.greatest(JobUnit.progress_done, min(done, claim.total)),
        )
        .returning(select(SelectionJob.status).where(SelectionJob.id == JobUnit.job_id).scalar_subquery())
    ).one_or_none()
    if renewed is None:
        raise LeaseLost
    return Beat(cancelling=renewed[0] == JobStatus.CANCELLING)


def lock_claim(session: Session, claim: Claim) -> SelectionJob:
    """Locks the job and checks the fence: after this the transaction may write the unit's outcome.

    Raises:
        LeaseLost: the unit is no longer this worker's.
    """
    job = _lock_job(session, claim.job_id)
    if session.scalar(select(JobUnit.id).where(*_held(claim)).with_for_update()) is None:
        raise LeaseLost
    return job


def finish_unit(session: Session, job: SelectionJob, claim: Claim, result: Mapping[str, Any]) -> bool:
    """Marks the locked claim succeeded. True where no unit of the job is left to do: then create the next, or end the job."""
    _end_unit(session, claim, UnitState.SUCCEEDED, result=dict(result), progress_done=JobUnit.progress_total)
    add_event(session, job.id, "unit.succeeded", **_unit_of(claim), attempt=claim.attempt)
    if job.status == JobStatus.CANCELLING:
        _end_cancelling(session, job)
        return False
    unfinished = session.scalar(
        select(func.count()).where(JobUnit.job_id == job.id, JobUnit.state != UnitState.SUCCEEDED)
    )
    return unfinished == 0


def start_stages(session: Session, job: SelectionJob, specs: Sequence[UnitSpec]) -> None:
    """Creates the units of the next wave, in the transaction that finished the last unit of the wave before."""
    _create_units(session, job.id, specs)
    add_event(session, job.id, "stages.started", stages=sorted({spec.stage.value for spec in specs}), units=len(specs))


def record_event(session: Session, claim: Claim, kind: str, data: Mapping[str, Any]) -> None:
    """Writes what a running unit has to tell (the loss of a training step).

    Raises:
        LeaseLost: the unit is no longer this worker's.
    """
    lock_claim(session, claim)
    add_event(session, claim.job_id, kind, **_unit_of(claim), **data)


def succeed_job(session: Session, job: SelectionJob) -> None:
    job.status = JobStatus.SUCCEEDED
    job.finished_at = func.clock_timestamp()
    add_event(session, job.id, "job.succeeded")


def fail_unit(session: Session, claim: Claim, error: Mapping[str, Any], *, retryable: bool, max_attempts: int) -> bool:
    """Ends an attempt with its error: the unit goes back to pending, or fails its job. True where it will be tried again.

    Raises:
        LeaseLost: the unit is no longer this worker's.
    """
    job = lock_claim(session, claim)
    return _end_attempt(session, job, claim, dict(error), retryable=retryable, max_attempts=max_attempts)


def _end_attempt(
    session: Session, job: SelectionJob, claim: Claim, error: dict[str, Any], *, retryable: bool, max_attempts: int
) -> bool:
    failures = _count_failure(session, claim)
    again = retryable and failures < max_attempts and job.status != JobStatus.CANCELLING
    add_event(
        session, job.id, "unit.attempt_failed", **_unit_of(claim), attempt=claim.attempt, error=error, retried=again
    )
    if again:
        _end_unit(session, claim, UnitState.PENDING, error=error)
        return True
    if job.status == JobStatus.CANCELLING:
        _end_unit(session, claim, UnitState.CANCELLED, error=error)
        _end_cancelling(session, job)
        return False
    _end_unit(session, claim, UnitState.FAILED, error=error)
    job.status = JobStatus.FAILED
    job.error = {**error, "stage": claim.stage.value, "shard": claim.shard, "attempts": claim.attempt}
    job.finished_at = func.clock_timestamp()
    _cancel_units(session, job.id, UnitState.PENDING, UnitState.RUNNING)
    add_event(session, job.id, "job.failed", error=job.error)
    return False


def release_unit(session: Session, claim: Claim, *, reason: str) -> None:
    """Gives a unit back unfinished (a worker that shuts down, a cancel that was seen). Not an attempt that failed.

    Raises:
        LeaseLost: the unit is no longer this worker's.
    """
    job = lock_claim(session, claim)
    if job.status == JobStatus.CANCELLING:
        _end_unit(session, claim, UnitState.CANCELLED)
        add_event(session, job.id, "unit.cancelled", **_unit_of(claim), attempt=claim.attempt)
        _end_cancelling(session, job)
        return
    _end_unit(session, claim, UnitState.PENDING)
    add_event(session, job.id, "unit.released", **_unit_of(claim), attempt=claim.attempt, reason=reason)


def request_cancel(session: Session, job: SelectionJob) -> None:
    """Cancels the job: at once where no unit runs, else when the running units have stopped. Repeating changes nothing."""
    job = _lock_job(session, job.id)
    if job.status not in _OPEN:
        return
    job.cancel_requested_at = func.clock_timestamp()
    _cancel_units(session, job.id, UnitState.PENDING)
    if job.status == JobStatus.RUNNING and _running_units(session, job.id):
        job.status = JobStatus.CANCELLING
        add_event(session, job.id, "job.cancelling")
        return
    _finish_cancelled(session, job)


def expire_leases(session: Session, *, max_attempts: int) -> int:
    """Takes back the units whose lease ran out: pending again, or their job fails after the last attempt. How many."""
    expired = session.execute(
        select(JobUnit).where(JobUnit.state == UnitState.RUNNING, JobUnit.lease_expires_at < func.clock_timestamp())
    ).scalars()
    count = 0
    for unit in expired.all():
        claim = _claim_of(unit)
        job = _lock_job(session, claim.job_id)
        still_expired = and_(*_held(claim), JobUnit.lease_expires_at < func.clock_timestamp())
        if session.scalar(select(JobUnit.id).where(still_expired).with_for_update()) is None:
            continue  # it beat, or ended, while the job's row was being locked
        error = {
            "code": "lease_expired",
            "detail": f"Worker {unit.worker_id} stopped answering (killed, cut off, or out of memory).",
        }
        _end_attempt(session, job, claim, error, retryable=True, max_attempts=max_attempts)
        count += 1
    return count


def claimable_count(session: Session) -> int:
    """How many units a worker could take now; those that wait for another job's artifact are told of when it is done."""
    return (
        session.scalar(
            select(func.count())
            .select_from(JobUnit)
            .join(SelectionJob, SelectionJob.id == JobUnit.job_id)
            .where(*_is_claimable())
        )
        or 0
    )


def unit_results(session: Session, job_id: str, *stages: Stage) -> list[JobUnit]:
    """The job's units of the stages, in order of stage and shard."""
    units = select(JobUnit).where(JobUnit.job_id == job_id).order_by(JobUnit.stage, JobUnit.shard)
    if stages:
        units = units.where(JobUnit.stage.in_(stages))
    return list(session.scalars(units.execution_options(populate_existing=True)))


def _lock_job(session: Session, job_id: str) -> SelectionJob:
    locked = select(SelectionJob).where(SelectionJob.id == job_id).with_for_update(key_share=True)
    return session.scalars(locked.execution_options(populate_existing=True)).one()


def _held(claim: Claim) -> tuple[Any, ...]:
    return (JobUnit.id == claim.unit_id, JobUnit.state == UnitState.RUNNING, JobUnit.attempt == claim.attempt)


def _end_unit(session: Session, claim: Claim, state: UnitState, **values: Any) -> None:
    finished = None if state == UnitState.PENDING else func.clock_timestamp()
    changed = session.execute(
        update(JobUnit)
        .where(*_held(claim))
        .values(state=state, lease_expires_at=None, finished_at=finished, **values)
        .returning(JobUnit.id)
    ).one_or_none()
    if changed is None:
        raise LeaseLost


def _cancel_units(session: Session, job_id: str, *states: UnitState) -> None:
    stages = session.scalars(
        update(JobUnit)
        .where(JobUnit.job_id == job_id, JobUnit.state.in_(states))
        .values(state=UnitState.CANCELLED, lease_expires_at=None, finished_at=func.clock_timestamp())
        .returning(JobUnit.stage)
    ).all()
    if stages:
        add_event(session, job_id, "units.cancelled", stages=sorted({s.value for s in stages}), units=len(stages))


def _count_failure(session: Session, claim: Claim) -> int:
    counted = update(JobUnit).where(*_held(claim)).values(failures=JobUnit.failures + 1).returning(JobUnit.failures)
    return session.scalars(counted).one()


def _running_units(session: Session, job_id: str) -> int:
    running = select(func.count()).where(JobUnit.job_id == job_id, JobUnit.state == UnitState.RUNNING)
    return session.scalar(running) or 0


def _end_cancelling(session: Session, job: SelectionJob) -> None:
    if not _running_units(session, job.id):
        _finish_cancelled(session, job)


def _finish_cancelled(session: Session, job: SelectionJob) -> None:
    job.status = JobStatus.CANCELLED
    job.finished_at = func.clock_timestamp()
    add_event(session, job.id, "job.cancelled")


def _claim_of(unit: JobUnit) -> Claim:
    return Claim(
        unit_id=unit.id,
        job_id=unit.job_id,
        attempt=unit.attempt,
        stage=unit.stage,
        shard=unit.shard,
        artifact_key=unit.artifact_key,
        spec=unit.spec,
        total=unit.progress_total,
    )


def _unit_of(claim: Claim) -> dict[str, Any]:
    return {"stage": claim.stage.value, "shard": claim.shard}


def _in_seconds(seconds: float) -> Any:
    return func.clock_timestamp() + timedelta(seconds=seconds)
