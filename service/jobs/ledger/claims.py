"""Jobs and units that begin: creating, claiming, beating."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from psycopg.errors import LockNotAvailable
from sqlalchemy import ColumnElement, exists, func, or_, select, text, true, update
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session, aliased

from service.jobs.ledger.rows import (
    OPEN,
    Beat,
    Claim,
    LeaseLost,
    UnitSpec,
    add_event,
    claim_of,
    create_units,
    held,
    in_seconds,
    lock_claim,
    lock_job,
    unit_of,
)
from service.jobs.state import JobStatus, UnitState
from service.jobs.tables import JobUnit, SelectionJob, WorkerProcess
from service.tenants.tables import Tenant


def create_job(session: Session, job: SelectionJob, first: Sequence[UnitSpec]) -> None:
    """Adds the job, its first units and its first event to the session's transaction."""
    session.add(job)
    session.flush()
    add_event(session, job.id, "job.queued")
    create_units(session, job.id, first, None)


def start_stages(session: Session, job: SelectionJob, specs: Sequence[UnitSpec], *, code: str | None = None) -> None:
    """Creates the units of the next wave, in the transaction that finished the last unit of the wave before.

    `code` is the version of the worker that planned them, of which the names of their artifacts speak.
    """
    create_units(session, job.id, specs, code)
    add_event(session, job.id, "stages.started", stages=sorted({spec.stage.value for spec in specs}), units=len(specs))


def claim_unit(
    session: Session, *, worker_id: str, lease_seconds: float, code: str | None = None, turn_seconds: float = 60.0
) -> Claim | None:
    """Takes the first unit that may run, or None. Of the tenant with the fewest units that run; where several have as few, of the
    one whose turn it is. Of a tenant's jobs the oldest comes first, then the order of stages and shards counts.

    A turn lasts `turn_seconds`, so that a worker does not change its model with each unit. The next one is of the tenant whose
    last turn began longest ago.

    A unit whose artifact is being made by another unit waits for that one. Where workers of two versions run, as in an upgrade,
    each does the units that its own version (`code`) has planned; those of a version that no live worker has are anyone's.
    A job whose row is held for longer than a moment is passed over. Commit at once: the claim holds a job's row.
    """
    held_up: list[str] = []
    while (candidate := _claimable_unit(session, code, lease_seconds, turn_seconds, held_up)) is not None:
        unit_id, job_id, in_turn = candidate
        # Rolled back where another was first: two claims that each kept the row of a job they missed could deadlock.
        attempt = session.begin_nested()
        try:
            session.execute(text("SET LOCAL lock_timeout = '1s'"))
            job = lock_job(session, job_id)
            claim = _take(session, unit_id, worker_id, lease_seconds) if job.status in OPEN else None
        except OperationalError as error:  # a worker that stands still in the midst of a write holds the row
            if not isinstance(error.orig, LockNotAvailable):
                raise
            attempt.rollback()
            held_up.append(job_id)
            continue
        if claim is None:
            attempt.rollback()
            continue
        attempt.commit()
        if not in_turn:
            _start_turn(session, job.tenant_id, turn_seconds)
        if job.status == JobStatus.QUEUED:
            job.status = JobStatus.RUNNING
            job.started_at = func.now()
            add_event(session, job_id, "job.running")
        add_event(session, job_id, "unit.claimed", **unit_of(claim), attempt=claim.attempt, worker_id=worker_id)
        return claim
    return None


def _is_claimable() -> tuple[ColumnElement[bool], ...]:
    """Of a unit joined to its job: that a worker may take it now."""
    other = aliased(JobUnit)
    being_made = exists().where(other.artifact_key == JobUnit.artifact_key, other.state == UnitState.RUNNING)
    is_due = or_(JobUnit.not_before.is_(None), JobUnit.not_before <= func.clock_timestamp())
    return SelectionJob.status.in_(OPEN), JobUnit.state == UnitState.PENDING, is_due, ~being_made


def _claimable_unit(
    session: Session, code: str | None, lease_seconds: float, turn_seconds: float, held_up: Sequence[str] = ()
) -> tuple[int, str, bool] | None:
    """(unit, job, whether it is the turn of its tenant already). Tenants are gone through in their order: what those behind the
    first that has a unit wait for is not looked at."""
    seen_after = func.clock_timestamp() - timedelta(seconds=lease_seconds)
    another = exists().where(
        WorkerProcess.version == JobUnit.code,
        WorkerProcess.version != code,
        WorkerProcess.stopped_at.is_(None),
        WorkerProcess.seen_at > seen_after,
    )
    first = (
        select(JobUnit.id, JobUnit.job_id)
        .join(SelectionJob, SelectionJob.id == JobUnit.job_id)
        .where(SelectionJob.tenant_id == Tenant.id)
        .where(*_is_claimable(), ~another, SelectionJob.id.not_in(held_up))
        .order_by(SelectionJob.created_at, SelectionJob.id, JobUnit.stage, JobUnit.shard)
        .limit(1)
        .lateral()
    )
    at_work = (
        select(SelectionJob.tenant_id, func.count().label("units"))
        .join(JobUnit, JobUnit.job_id == SelectionJob.id)
        .where(JobUnit.state == UnitState.RUNNING)
        .group_by(SelectionJob.tenant_id)
        .subquery()
    )
    in_turn = ~_turn_is_over(turn_seconds)
    row = session.execute(
        select(first.c.id, first.c.job_id, in_turn.label("in_turn"))
        .select_from(Tenant)
        .outerjoin(at_work, at_work.c.tenant_id == Tenant.id)
        .join(first, true())
        .where(exists().where(SelectionJob.tenant_id == Tenant.id, SelectionJob.status.in_(OPEN)))
        .order_by(func.coalesce(at_work.c.units, 0), in_turn.desc(), Tenant.turn_started_at.nulls_first(), Tenant.id)
        .limit(1)
    ).one_or_none()
    return None if row is None else (row.id, row.job_id, row.in_turn)


def _turn_is_over(turn_seconds: float) -> ColumnElement[bool]:
    began_before = func.clock_timestamp() - timedelta(seconds=turn_seconds)
    return func.coalesce(Tenant.turn_started_at <= began_before, true())


def _start_turn(session: Session, tenant_id: str, turn_seconds: float) -> None:
    """Waits for nobody: where another claim holds the tenant's row, it starts the turn just now."""
    free = select(Tenant.id).where(Tenant.id == tenant_id, _turn_is_over(turn_seconds))
    free = free.with_for_update(key_share=True, skip_locked=True)
    session.execute(
        update(Tenant)
        .where(Tenant.id.in_(free))
        .values(turn_started_at=func.clock_timestamp())
        .execution_options(synchronize_session=False)
    )


def _take(session: Session, unit_id: int, worker_id: str, lease_seconds: float) -> Claim | None:
    """The conditional UPDATE of a claim; None where another worker was first with this unit or with its artifact."""
    taken = (
        update(JobUnit)
        .where(JobUnit.id == unit_id, JobUnit.state == UnitState.PENDING)
        .values(
            state=UnitState.RUNNING,
            attempt=JobUnit.attempt + 1,
            worker_id=worker_id,
            lease_expires_at=in_seconds(lease_seconds),
            started_at=func.clock_timestamp(),
            not_before=None,
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
    return claim_of(unit)


def claimable_count(session: Session, *, most: int | None = None) -> int:
    """How many units a worker could take now, counted up to `most`; those that wait for another job's artifact are told of when
    it is done."""
    units = select(JobUnit.id).join(SelectionJob, SelectionJob.id == JobUnit.job_id).where(*_is_claimable())
    return session.scalar(select(func.count()).select_from(units.limit(most).subquery())) or 0


def beat(session: Session, claim: Claim, *, lease_seconds: float, done: int) -> Beat:
    """Renews the lease and writes the progress, which never goes back within an attempt.

    Raises:
        LeaseLost: the unit is no longer this worker's.
    """
    renewed = session.execute(
        update(JobUnit)
        .where(*held(claim))
        .values(
            lease_expires_at=in_seconds(lease_seconds),
            progress_done=func.greatest(JobUnit.progress_done, min(done, claim.total)),
        )
        .returning(select(SelectionJob.status).where(SelectionJob.id == JobUnit.job_id).scalar_subquery())
    ).one_or_none()
    if renewed is None:
        raise LeaseLost
    return Beat(cancelling=renewed[0] == JobStatus.CANCELLING)


def record_event(session: Session, claim: Claim, kind: str, data: Mapping[str, Any]) -> None:
    """Writes what a running unit has to tell (the loss of a training step).

    Raises:
        LeaseLost: the unit is no longer this worker's.
    """
    lock_claim(session, claim)
    add_event(session, claim.job_id, kind, **unit_of(claim), **data)
