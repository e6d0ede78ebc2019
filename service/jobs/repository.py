"""SQL that reads jobs, scoped by tenant. What changes them is in ledger.py."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import BigInteger, Row, cast, func, select
from sqlalchemy.orm import Session

from service import ids
from service.jobs.state import JobStatus, UnitState
from service.jobs.tables import JobEvent, JobUnit, SelectionJob


def is_id(value: str) -> bool:
    return ids.is_id("job", value)


def get(session: Session, tenant_id: str, job_id: str) -> SelectionJob | None:
    if not is_id(job_id):
        return None
    return session.scalar(select(SelectionJob).where(SelectionJob.id == job_id, SelectionJob.tenant_id == tenant_id))


def page(
    session: Session, tenant_id: str, *, after: str | None, status: JobStatus | None, limit: int
) -> list[SelectionJob]:
    """At most `limit`, newest first, older than `after`."""
    jobs = select(SelectionJob).where(SelectionJob.tenant_id == tenant_id)
    if after is not None:
        jobs = jobs.where(SelectionJob.id < after)
    if status is not None:
        jobs = jobs.where(SelectionJob.status == status)
    return list(session.scalars(jobs.order_by(SelectionJob.id.desc()).limit(limit)))


def stage_rows(session: Session, job_ids: Sequence[str]) -> Sequence[Row[Any]]:
    """One row for each job and stage: counts, progress and times of its units."""
    done = JobUnit.state == UnitState.SUCCEEDED
    return session.execute(
        select(
            JobUnit.job_id,
            JobUnit.stage,
            func.count().label("units"),
            func.count().filter(done).label("units_done"),
            func.count().filter(JobUnit.result["reused"].as_boolean()).label("units_reused"),
            cast(func.sum(JobUnit.progress_done), BigInteger).label("done"),  # the sum of bigints is numeric
            cast(func.sum(JobUnit.progress_total), BigInteger).label("total"),
            func.min(JobUnit.started_at).label("started_at"),
            func.max(JobUnit.finished_at).label("finished_at"),
            func.clock_timestamp().label("now"),
        )
        .where(JobUnit.job_id.in_(job_ids))
        .group_by(JobUnit.job_id, JobUnit.stage)
        .order_by(JobUnit.job_id, JobUnit.stage)
    ).all()


def events(session: Session, job_id: str, *, after: int, limit: int) -> list[JobEvent]:
    """Oldest first, one more than the limit where there are more."""
    return list(
        session.scalars(
            select(JobEvent)
            .where(JobEvent.job_id == job_id, JobEvent.id > after)
            .order_by(JobEvent.id)
            .limit(limit + 1)
        )
    )
