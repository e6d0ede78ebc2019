"""All SQL of quotas: what a key has used. A key is of one tenant, so a query by key is scoped to it."""

from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session, aliased

from service.datasets.tables import Dataset
from service.jobs.state import TERMINAL, JobStatus
from service.jobs.tables import SelectionJob

DAY = timedelta(days=1)


def lock(session: Session, key_id: str, quota: str) -> None:
    """Until the transaction ends, no other one counts this quota of the key: what it is about to make, the next one sees."""
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"quotas/{quota}/{key_id}", 0))))


def open_jobs(session: Session, tenant_id: str, key_id: str) -> int:
    """Found among the open jobs of its tenant, for which there is an index."""
    jobs = select(func.count()).where(SelectionJob.tenant_id == tenant_id, SelectionJob.key_id == key_id)
    return session.scalar(jobs.where(SelectionJob.status.in_(set(JobStatus) - TERMINAL))) or 0


def stored_bytes(session: Session, key_id: str) -> int:
    """Of the rows of its live datasets; the same content twice counts twice."""
    stored = select(func.sum(Dataset.byte_count)).where(Dataset.key_id == key_id, Dataset.deleted_at.is_(None))
    return int(session.scalar(stored) or 0)


def samples_today(session: Session, key_id: str, room: int = 0) -> tuple[int, datetime | None]:
    """The samples of the key's jobs of the last 24 hours, however they ended; and when enough of them have left those hours that
    at most `room` are in them, None where so few are there now."""
    pool, target = aliased(Dataset), aliased(Dataset)
    samples = func.sum(pool.row_count + target.row_count)
    jobs = (
        select(
            SelectionJob.created_at,
            samples.over(order_by=(SelectionJob.created_at.desc(), SelectionJob.id.desc())).label("and_later"),
        )
        .join(pool, pool.id == SelectionJob.pool_id)
        .join(target, target.id == SelectionJob.target_id)
        # Not clock_timestamp(), for which no index is used.
        .where(SelectionJob.key_id == key_id, SelectionJob.created_at > func.statement_timestamp() - DAY)
        .subquery()
    )
    last_to_leave = func.max(jobs.c.created_at).filter(jobs.c.and_later > room)
    used, last = session.execute(select(func.max(jobs.c.and_later), last_to_leave)).one()
    return int(used or 0), None if last is None else last + DAY
