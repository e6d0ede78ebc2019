"""All SQL on datasets. A tenant's scope is part of each query that a caller's id reaches."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, delete, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from service import ids
from service.datasets.tables import Dataset, Upload
from service.db.pagination import paginate
from service.ledger.state import TERMINAL
from service.ledger.tables import SelectionJob
from service.tasks import Task


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


def page(session: Session, tenant_id: str, after: str | None, limit: int) -> tuple[list[Dataset], bool]:
    """Of the tenant's live datasets, newest first."""
    live = select(Dataset).where(Dataset.tenant_id == tenant_id, Dataset.deleted_at.is_(None))
    return paginate(session, live, Dataset.id, after=after, limit=limit)


def names(session: Session, tenant_id: str, dataset_ids: Collection[str]) -> dict[str, str]:
    """Of the tenant's datasets, deleted ones too, by id."""
    named = select(Dataset.id, Dataset.name).where(Dataset.tenant_id == tenant_id, Dataset.id.in_(dataset_ids))
    return {row.id: row.name for row in session.execute(named)}


def delete_tasks_of(session: Session, tenant_id: str, fingerprint: str) -> None:
    """Cancels and forgets what workers compute, or have computed, of a content for the tenant: the subject begins with it."""
    of_content = Task.subject.startswith(f"{fingerprint}/", autoescape=True)
    session.execute(delete(Task).where(Task.tenant_id == tenant_id, of_content))


def unfinished_job_of(session: Session, dataset_id: str) -> str | None:
    """The id of a job that still needs the dataset."""
    return session.scalar(
        select(SelectionJob.id)
        .where(_refers_to(dataset_id), SelectionJob.status.not_in(TERMINAL))
        .order_by(SelectionJob.id)
        .limit(1)
    )


def stored_bytes(session: Session, key_id: str) -> int:
    """Of the rows and reports of the key's live datasets, equal content twice, and of its uploads in parts, which
    count whole from their beginning."""
    size = func.sum(Dataset.byte_count + Dataset.skipped_bytes)
    stored = select(size).where(Dataset.key_id == key_id, Dataset.deleted_at.is_(None))
    uploads = select(func.sum(Upload.bytes)).where(Upload.key_id == key_id)
    return int(session.scalar(stored) or 0) + int(session.scalar(uploads) or 0)


def content_lock(fingerprint: str) -> str:
    """The advisory lock of whoever publishes or removes the files of this fingerprint."""
    return f"datasets/{fingerprint}"


def of_origin(session: Session, key_id: str, origin: Mapping[str, Any]) -> Sequence[Dataset]:
    """The key's live datasets that were asked for so, newest first."""
    live = select(Dataset).where(
        Dataset.key_id == key_id, Dataset.deleted_at.is_(None), Dataset.origin.contains(origin)
    )
    return session.scalars(live.order_by(Dataset.id.desc())).all()


def is_live_content(session: Session, fingerprint: str) -> bool:
    """Whether a dataset of any tenant still has this content."""
    query = select(Dataset.id).where(Dataset.fingerprint == fingerprint, Dataset.deleted_at.is_(None))
    return session.scalar(query.limit(1)) is not None


def live_among(session: Session, dataset_ids: Collection[str]) -> set[str]:
    """Those of the datasets, of any tenant, that were not deleted."""
    return set(session.scalars(select(Dataset.id).where(Dataset.id.in_(dataset_ids), Dataset.deleted_at.is_(None))))


def is_named_content(session: Session, fingerprint: str) -> bool:
    """Whether a job of any state and tenant, not deleted, refers to this content."""
    query = select(SelectionJob.id).join(Dataset, _refers_to(Dataset.id)).where(Dataset.fingerprint == fingerprint)
    query = query.where(SelectionJob.deleted_at.is_(None))
    return session.scalar(query.limit(1)) is not None


def _live(tenant_id: str, dataset_id: str) -> Select[Dataset]:
    return select(Dataset).where(Dataset.id == dataset_id, Dataset.tenant_id == tenant_id, Dataset.deleted_at.is_(None))


def _refers_to(dataset_id: str | InstrumentedAttribute[str]) -> ColumnElement[bool]:
    return or_(SelectionJob.pool_id == dataset_id, SelectionJob.target_id == dataset_id)
