"""Reading the audit log. Writing is an insert in the transaction of what it records (`service.audit.service`)."""

from collections.abc import Iterable
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.audit.tables import AuditEntry
from service.auth.tables import ApiKey
from service.db.pagination import paginate


def page(
    session: Session,
    tenant_id: str,
    *,
    after: int | None,
    limit: int,
    created_after: datetime | None,
    created_before: datetime | None,
    **equal: str | None,
) -> tuple[list[AuditEntry], bool]:
    """The tenant's entries, newest first; `equal` are values of columns, None for any."""
    entries = select(AuditEntry).where(AuditEntry.tenant_id == tenant_id)
    entries = entries.filter_by(**{name: value for name, value in equal.items() if value is not None})
    if created_after is not None:
        entries = entries.where(AuditEntry.created_at > created_after)
    if created_before is not None:
        entries = entries.where(AuditEntry.created_at < created_before)
    return paginate(session, entries, AuditEntry.id, after=after, limit=limit)


def keys(session: Session, entries: Iterable[AuditEntry]) -> dict[str, ApiKey]:
    """The API keys of the entries, by id."""
    key_ids = {entry.key_id for entry in entries if entry.key_id is not None}
    return {key.id: key for key in session.scalars(select(ApiKey).where(ApiKey.id.in_(key_ids)))}
