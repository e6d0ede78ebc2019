"""Finding a tenant's job: the one query through which an id that a client sent reaches the ledger."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from service import ids
from service.http.errors import NotFound
from service.ledger.tables import SelectionJob


def find_job(session: Session, tenant_id: str, job_id: str, *, or_deleted: bool = False) -> SelectionJob | None:
    if not ids.is_id("job", job_id):
        return None
    job = select(SelectionJob).where(SelectionJob.id == job_id, SelectionJob.tenant_id == tenant_id)
    return session.scalar(job if or_deleted else job.where(SelectionJob.deleted_at.is_(None)))


def require_job(session: Session, tenant_id: str, job_id: str, *, or_deleted: bool = False) -> SelectionJob:
    """The tenant's job.

    Raises:
        NotFound: there is none by this id, or it is another tenant's.
    """
    job = find_job(session, tenant_id, job_id, or_deleted=or_deleted)
    if job is None:
        raise NotFound(f"No selection job {job_id!r}. List yours with GET /v1/selection-jobs.", param="job_id")
    return job
