"""All SQL on datasets. A tenant's scope is part of each query that a caller's id reaches."""

from collections.abc import Sequence

from sqlalchemy import ColumnElement, Function, Select, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from service import ids
from service.datasets.tables import Dataset
from service.jobs.state import TERMINAL
from service.jobs.tables import SelectionJob


def is_id(value: str) -> bool:
    return ids.is_id("ds", value)


def add(session: Session, dataset: Dataset) -> None:
    session.add(dataset)
    session.flush()
    session.refresh(dataset)


def live(session: Session, tenant_id: str, dataset_id: str) -> Dataset | None:
    return session.scalar(_live(tenant_id, dataset_id)) if is_id(dataset_id) else None


def live_kept(session: Session, tenant_id: str, dataset_id: str) -> Dataset | None:
    """The dataset, which cannot be deleted before the transaction ends."""
    return session.scalar(_live(tenant_id, dataset_id).with_for_update(read=True)) if is_id(dataset_id) else None


def live_content_kept(session: Session, tenant_id: str, fingerprint: str) -> Dataset | None:
    """The tenant's newest dataset with this content, which cannot be deleted before the transaction ends."""
    query = select(Dataset).where(
        Dataset.tenant_id == tenant_id, Dataset.fingerprint == fingerprint, Dataset.deleted_at.is_(None)
    )
    return session.scalar(query.order_by(Dataset.id.desc()).limit(1).with_for_update(read=True))


def live_to_delete(session: Session, tenant_id: str, dataset_id: str) -> Dataset | None:
    """The dataset, once no transaction that keeps it is open."""
    return session.scalar(_live(tenant_id, dataset_id).with_for_update()) if is_id(dataset_id) else None


def page(session: Session, tenant_id: str, after: str | None, limit: int) -> Sequence[Dataset]:
    """At most `limit` live datasets, newest first, older than `after`."""
    query = select(Dataset).where(Dataset.tenant_id == tenant_id, Dataset.deleted_at.is_(None))
    if after is not None:
        query = query.where(Dataset.id < after)
    return session.scalars(query.order_by(Dataset.id.desc()).limit(limit)).all()


def unfinished_job_of(session: Session, dataset_id: str) -> str | None:
    """The id of a job that still needs the dataset."""
    return session.scalar(
        select(SelectionJob.id)
        .where(_refers_to(dataset_id), SelectionJob.status.not_in(TERMINAL))
        .order_by(SelectionJob.id)
        .limit(1)
    )


def lock_content(session: Session, fingerprint: str) -> None:
    """Until the transaction ends, no other one publishes or removes the files of this fingerprint."""
    session.execute(select(func.pg_advisory_xact_lock(_content_lock(fingerprint))))


def lock_content_if_free(session: Session, fingerprint: str) -> bool:
    """As `lock_content`, but False where another transaction holds it, which an upload does for as long as it publishes."""
    return bool(session.scalar(select(func.pg_try_advisory_xact_lock(_content_lock(fingerprint)))))


def _content_lock(fingerprint: str) -> Function[int]:
    return func.hashtextextended(f"datasets/{fingerprint}", 0)


def is_live_content(session: Session, fingerprint: str) -> bool:
    """Whether a dataset of any tenant still has this content."""
    query = select(Dataset.id).where(Dataset.fingerprint == fingerprint, Dataset.deleted_at.is_(None))
    return session.scalar(query.limit(1)) is not None


def is_named_content(session: Session, fingerprint: str) -> bool:
    """Whether a job of any state and tenant, not deleted, refers to this content."""
    query = select(SelectionJob.id).join(Dataset, _refers_to(Dataset.id)).where(Dataset.fingerprint == fingerprint)
    query = query.where(SelectionJob.deleted_at.is_(None))
    return session.scalar(query.limit(1)) is not None


def _live(tenant_id: str, dataset_id: str) -> Select[Dataset]:
    return select(Dataset).where(Dataset.id == dataset_id, Dataset.tenant_id == tenant_id, Dataset.deleted_at.is_(None))


def _refers_to(dataset_id: str | InstrumentedAttribute[str]) -> ColumnElement[bool]:
    return or_(SelectionJob.pool_id == dataset_id, SelectionJob.target_id == dataset_id)
