"""`/v1/audit-log`: who did what."""

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import StringConstraints

from service.audit import repository
from service.audit.schemas import AuditEntryOut, AuditKey, AuditPage
from service.database import SessionDep
from service.errors import Forbidden, Unauthorized, Unprocessable, responses
from service.moments import Moment
from service.pages import Limit
from service.tenants.service import AdminDep

router = APIRouter(tags=["audit"], responses=responses(Unauthorized, Forbidden, Unprocessable))

# PostgreSQL stores no NUL, and refuses to look for one.
Name = Annotated[str, StringConstraints(pattern=r"^[\x20-\x7e]{1,255}$")]


@router.get("/audit-log", summary="Who did what in your tenant, newest first")
def list_entries(
    session: SessionDep,
    caller: AdminDep,
    limit: Limit = 100,
    after: Annotated[int | None, Query(ge=1, lt=2**63, description="`last_id` of the page before")] = None,
    action: Annotated[Name | None, Query(description="Only this, as `selection_job.deleted`")] = None,
    object_id: Annotated[Name | None, Query(description="Only what was done to this")] = None,
    key_id: Annotated[Name | None, Query(description="Only what was done with this API key")] = None,
    created_after: Annotated[Moment | None, Query(description="Only later")] = None,
    created_before: Annotated[Moment | None, Query(description="Only earlier")] = None,
) -> AuditPage:
    """Needs a key with the scope `admin`. Entries are written in the transaction of what they tell of, and cannot be changed."""
    found = repository.page(
        session,
        caller.tenant_id,
        after=after,
        action=action,
        object_id=object_id,
        key_id=key_id,
        created_after=created_after,
        created_before=created_before,
        limit=limit + 1,
    )
    data = [
        AuditEntryOut(
            id=entry.id,
            created_at=entry.created_at,
            actor=entry.actor,
            key=None if entry.key_id is None else AuditKey(id=entry.key_id, prefix=prefix, name=name),
            action=entry.action,
            object_id=entry.object_id,
            request_id=entry.request_id,
            detail=entry.detail,
        )
        for entry, prefix, name in found[:limit]
    ]
    return AuditPage(data=data, has_more=len(found) > limit, last_id=data[-1].id if data else None)
