"""Units that begin: planned, created, claimed, beating."""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Integer,
    Select,
    and_,
    bindparam,
    exists,
    func,
    literal,
    or_,
    select,
    text,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session, aliased

from service.auth.tables import Tenant
from service.db.locks import advisory_key
from service.ledger.rows import (
    OPEN,
    Beat,
    Claim,
    Lack,
    LeaseLost,
    add_event,
    claim_of,
    create_units,
    in_seconds,
    is_current_claim,
    lock_claim,
    unit_of,
)
from service.ledger.state import JobStatus, UnitState
from service.ledger.tables import JobUnit, SelectionJob, Worker
from service.plan.estimate import planned_seconds
from service.plan.stages import UnitSpec

# While every claimable unit is held by other transactions.
_BUSY_SECONDS = 1.0
_PAUSE_SECONDS = (0.01, 0.03)

# How long a unit waits for its job's first plan; nothing but the order of events depends on that.
PLAN_SECONDS = 10


_WRITE_PLANS = text("""
    WITH unplanned AS (
        SELECT j.id, p.plan, p.seconds FROM jsonb_to_recordset(:plans) AS p (id text, plan jsonb, seconds jsonb)
            JOIN selection_jobs j ON j.id = p.id
        WHERE j.awaits_plan AND j.status IN ('queued', 'running')
        ORDER BY j.id FOR NO KEY UPDATE OF j SKIP LOCKED
    ), planned AS (
        UPDATE selection_jobs j SET awaits_plan = false, planned_seconds = u.seconds
        FROM unplanned u WHERE j.id = u.id RETURNING j.id, u.plan
    )
    INSERT INTO job_events (job_id, type, data) SELECT id, 'job.planned', plan FROM planned ORDER BY id RETURNING job_id
""").bindparams(bindparam("plans", type_=JSONB))


def write_plans(session: Session, plans: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Writes the first plans of jobs, by their ids, and returns which were written: not of a job that has one or has ended,
    nor, for this time, of one whose row someone holds."""
    sent = [{"id": job_id, "plan": plan, "seconds": planned_seconds(plan)} for job_id, plan in plans.items()]
    return set(session.scalars(_WRITE_PLANS, {"plans": sent}))


def add_plan(session: Session, job: SelectionJob, plan: Mapping[str, Any]) -> None:
    """Writes a later plan of a job, or the first one of a job that had to wait for its datasets."""
    job.planned_seconds = planned_seconds(plan)
    add_event(session, job.id, "job.planned", **plan)


def start_stages(session: Session, job: SelectionJob, specs: Sequence[UnitSpec], *, code: str | None = None) -> None:
    """Creates the units of the next wave, in the transaction that finished the last unit of the wave before.

    `code` is the version of the worker that planned them, which the names of their artifacts contain.
    """
    create_units(session, job.id, specs, code)
    add_event(session, job.id, "stages.started", stages=sorted({spec.stage.value for spec in specs}), units=len(specs))


def claim_unit(
    session: Session,
    *,
    worker_id: str,
    lease_seconds: float,
    code: str | None = None,
    turn_seconds: float = 60.0,
    without: Sequence[Lack] = (),
) -> Claim | None:
    """Takes the first unit that may run, or None. Tenants with fewer running units come first; among equals the one that is
    scheduled now, then the one scheduled longest ago. Within a tenant the oldest job comes first, then stage and shard in order.

    A tenant stays scheduled for `turn_seconds`, so that a worker does not change its model with each unit.

    A unit whose artifact another unit is making waits for that one. Where workers of two versions run, as in an upgrade, each
    does the units that its own version (`code`) has planned; those of a version that no live worker has are anyone's. What the
    worker lacks (`without`) is left to others.

    No row is waited for: what another transaction holds is skipped. Where everything is held, most likely by claims of other
    workers, it looks again for up to a second. Commit at once: the claim holds a job's row.
    """
    is_claimable = (*_is_claimable_by(code, lease_seconds), *_is_not_of(without))
    give_up_at = time.monotonic() + _BUSY_SECONDS
    while True:
        candidate = session.execute(_first_free(is_claimable, turn_seconds)).one_or_none()
        if candidate is not None and (claim := take(session, candidate.id, worker_id, lease_seconds)) is not None:
            break
        if time.monotonic() > give_up_at or not session.scalar(select(exists(_units().where(*is_claimable)))):
            return None
        time.sleep(random.uniform(*_PAUSE_SECONDS))
    job = session.get_one(SelectionJob, claim.job_id, populate_existing=True)
    if candidate.turn_is_over:
        _schedule(session, job.tenant_id, turn_seconds)
    if job.status == JobStatus.QUEUED:
        job.status = JobStatus.RUNNING
        job.started_at = func.now()
        add_event(session, job.id, "job.running")
    add_event(session, job.id, "unit.claimed", **unit_of(claim), attempt=claim.attempt, worker_id=worker_id)
    return claim


def _units() -> Select[int]:
    return select(JobUnit.id).join(SelectionJob, SelectionJob.id == JobUnit.job_id)


def _is_claimable() -> tuple[ColumnElement[bool], ...]:
    """Conditions on a unit joined to its job: a worker may take it now."""
    return _is_open(), *_is_free()


def _is_open() -> ColumnElement[bool]:
    """A condition on a job: its units may be claimed."""
    waited = SelectionJob.created_at < func.clock_timestamp() - timedelta(seconds=PLAN_SECONDS)
    return and_(SelectionJob.status.in_(OPEN), or_(~SelectionJob.awaits_plan, waited))


def _is_free() -> tuple[ColumnElement[bool], ...]:
    """Conditions on a unit alone: a worker may take it now if its job is open."""
    is_due = or_(JobUnit.not_before.is_(None), JobUnit.not_before <= func.clock_timestamp())
    maker = aliased(JobUnit)
    # A scalar subquery is looked up for the few that wait; for EXISTS PostgreSQL may hash all units that ever succeeded.
    made = select(maker.state).where(maker.id == JobUnit.waits_for).scalar_subquery()
    has_input = or_(JobUnit.waits_for.is_(None), made == UnitState.SUCCEEDED)
    return JobUnit.state == UnitState.PENDING, is_due, has_input, ~_is_being_made()


def _is_being_made() -> ColumnElement[bool]:
    """Another unit, perhaps of another job, is computing the unit's artifact."""
    other = aliased(JobUnit)
    return exists().where(other.artifact_key == JobUnit.artifact_key, other.state == UnitState.RUNNING)


def _is_claimable_by(code: str | None, lease_seconds: float) -> tuple[ColumnElement[bool], ...]:
    """As `_is_claimable`, and no other version that is alive has planned it."""
    is_of_another = exists().where(
        Worker.version == JobUnit.code,
        Worker.version != code,
        Worker.stopped_at.is_(None),
        Worker.seen_at > func.clock_timestamp() - timedelta(seconds=lease_seconds),
    )
    return *_is_claimable(), ~is_of_another


def _is_not_of(lacks: Sequence[Lack]) -> Iterator[ColumnElement[bool]]:
    if models := [lack.model for lack in lacks if lack.model is not None]:
        yield SelectionJob.model.not_in(models)
    if jobs := [lack.job_id for lack in lacks if lack.job_id is not None]:
        yield SelectionJob.id.not_in(jobs)


def _first_free(is_claimable: Sequence[ColumnElement[bool]], turn_seconds: float) -> Select[int, bool]:
    """(id, turn_is_over) of the first unit that no other transaction holds: with its job's row, its own row and the lock of its
    artifact, without which an uncommitted claim of the same artifact would have to be waited for.

    Units are locked one by one, in order, until one is free; those of the tenants behind its tenant are not even read. OFFSET 0
    keeps PostgreSQL from merging the queries into one, which would lock all units before it sorts them.
    """
    running = (
        select(SelectionJob.tenant_id, func.count().label("units"))
        .join(JobUnit, JobUnit.job_id == SelectionJob.id)
        .where(JobUnit.state == UnitState.RUNNING)
        .group_by(SelectionJob.tenant_id)
        .subquery()
    )
    turn_is_over, running_units = _turn_is_over(turn_seconds), func.coalesce(running.c.units, 0)
    tenants = (
        select(Tenant.id, Tenant.last_scheduled_at, turn_is_over.label("turn_is_over"), running_units.label("units"))
        .outerjoin(running, running.c.tenant_id == Tenant.id)
        .where(exists().where(SelectionJob.tenant_id == Tenant.id, SelectionJob.status.in_(OPEN)))
        .order_by(running_units, turn_is_over, Tenant.last_scheduled_at.nulls_first(), Tenant.id)
        .offset(0)
        .subquery()
    )
    units = (
        _units()
        .add_columns(JobUnit.artifact_key)
        .where(SelectionJob.tenant_id == tenants.c.id, *is_claimable)
        .order_by(SelectionJob.created_at, SelectionJob.id, JobUnit.stage, JobUnit.shard)
        .with_for_update(of=(SelectionJob, JobUnit), key_share=True, skip_locked=True)
        .offset(0)
        .lateral()
    )
    artifact_lock = advisory_key(literal("artifacts/").concat(units.c.artifact_key))
    order = tenants.c.units, tenants.c.turn_is_over, tenants.c.last_scheduled_at.nulls_first(), tenants.c.id
    return (
        select(units.c.id, tenants.c.turn_is_over)
        .select_from(tenants)
        .join(units, true())
        .where(func.pg_try_advisory_xact_lock(artifact_lock))
        .order_by(*order)
        .limit(1)
    )


def _turn_is_over(turn_seconds: float) -> ColumnElement[bool]:
    began_before = func.clock_timestamp() - timedelta(seconds=turn_seconds)
    return func.coalesce(Tenant.last_scheduled_at <= began_before, true())


def _schedule(session: Session, tenant_id: str, turn_seconds: float) -> None:
    """Starts the tenant's turn; where another claim holds the tenant's row, that one does so just now."""
    free = select(Tenant.id).where(Tenant.id == tenant_id, _turn_is_over(turn_seconds))
    free = free.with_for_update(key_share=True, skip_locked=True)
    session.execute(
        update(Tenant)
        .where(Tenant.id.in_(free))
        .values(last_scheduled_at=func.clock_timestamp())
        .execution_options(synchronize_session=False)
    )


def take(session: Session, unit_id: int, worker_id: str, lease_seconds: float) -> Claim | None:
    """The conditional UPDATE of a claim; None where its artifact was claimed after the query for candidates had begun."""
    taken = (
        update(JobUnit)
        .where(JobUnit.id == unit_id, JobUnit.state == UnitState.PENDING, ~_is_being_made())
        .values(
            state=UnitState.RUNNING,
            attempt=JobUnit.attempt + 1,
            worker_id=worker_id,
            lease_expires_at=in_seconds(lease_seconds),
            started_at=func.clock_timestamp(),
            not_before=None,
            waits_for=None,
            progress_done=0,
        )
        .returning(JobUnit)
        .execution_options(populate_existing=True, synchronize_session=False)
    )
    unit = session.scalars(taken).one_or_none()
    return None if unit is None else claim_of(unit)


def claimable_count(session: Session, *, most: int | None = None) -> int:
    """How many units a worker could take now, counted up to `most`; those that wait for another unit's artifact become claimable
    when it is done."""
    return session.scalar(_claimable_count(), {"most": most}) or 0


@cache  # building it takes longer than running it
def _claimable_count() -> Select[int]:
    # Not joined: PostgreSQL may go through all jobs and all units in their order then, for the few that are asked for.
    is_open = select(_is_open()).where(SelectionJob.id == JobUnit.job_id).scalar_subquery()
    units = select(JobUnit.id).where(is_open, *_is_free()).limit(bindparam("most", type_=Integer))
    return select(func.count()).select_from(units.subquery())


def beat(session: Session, claim: Claim, *, lease_seconds: float, done: int) -> Beat:
    """Renews the lease and writes the progress, which never goes back within an attempt.

    Raises:
        LeaseLost: the unit is no longer this worker's.
    """
    renewed = session.execute(
        update(JobUnit)
        .where(*is_current_claim(claim))
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
    """Writes an event of a running unit (the loss of a training step).

    Raises:
        LeaseLost: the unit is no longer this worker's.
    """
    lock_claim(session, claim)
    add_event(session, claim.job_id, kind, **unit_of(claim), **data)
