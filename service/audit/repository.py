"""Reading the audit log. Writing is an insert in the transaction of what it tells of (`service.audit.service`)."""

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.audit.tables import AuditEntry
from service.tenants.tables import ApiKey


def page(
    session: Session,
    tenant_id: str,
    *,
    after: int | None,
    action: str | None,
    object_id: str | None,
    key_id: str | None,
    created_after: datetime | None,
    created_before: datetime | None,
    limit: int,
) -> list[tuple[AuditEntry, str | None, str | None]]:
    """At most `limit` of the tenant's entries, newest first, older than `after`, each with its key's prefix and name."""
    entry = AuditEntry
    found = select(entry, ApiKey.prefix, ApiKey.name).outerjoin(ApiKey, ApiKey.id == entry.key_id)
    found = found.where(entry.tenant_id == tenant_id)
    for column, value in ((entry.action, action), (entry.object_id, object_id), (entry.key_id, key_id)):
        if value is not None:
            found = found.where(column == value)
    if after is not None:
        found = found.where(entry.id < after)
    if created_after is not None:
        found = found.where(entry.created_at > created_after)
    if created_before is not None:
        found = found.where(entry.created_at < created_before)
    return [(row[0], row[1], row[2]) for row in session.execute(found.order_by(entry.id.desc()).limit(limit))]
