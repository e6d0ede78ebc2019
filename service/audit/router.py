"""`/v1/audit-log`: who did what."""

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import StringConstraints

from service.audit import repository
from service.audit.schemas import AuditEntryOut, AuditPage
from service.auth.authentication import AdminDep
from service.db.engine import SessionDep
from service.http.errors import Forbidden, Unauthorized, Unprocessable, responses
from service.http.pagination import Limit
from service.http.timestamps import Moment

router = APIRouter(tags=["audit"], responses=responses(Unauthorized, Forbidden, Unprocessable))

# PostgreSQL stores no NUL, and refuses to look for one.
Name = Annotated[str, StringConstraints(pattern=r"^[\x20-\x7e]{1,255}$")]


@router.get("/audit-log", summary="Who did what in your tenant, newest first")
def list_entries(
    session: SessionDep,
    principal: AdminDep,
    limit: Limit = 100,
    after: Annotated[int | None, Query(ge=1, lt=2**63, description="`last_id` of the previous page")] = None,
    action: Annotated[Name | None, Query(description="Only this action, such as `selection_job.deleted`")] = None,
    object_id: Annotated[Name | None, Query(description="Only actions on this object")] = None,
    key_id: Annotated[Name | None, Query(description="Only actions with this API key")] = None,
    created_after: Annotated[Moment | None, Query(description="Only later")] = None,
    created_before: Annotated[Moment | None, Query(description="Only earlier")] = None,
) -> AuditPage:
    """Needs a key with the scope `admin`. Entries are written in the transaction of what they record and cannot be changed."""
    entries, has_more = repository.page(
        session,
        principal.tenant_id,
        after=after,
        limit=limit,
        created_after=created_after,
        created_before=created_before,
        action=action,
        object_id=object_id,
        key_id=key_id,
    )
    keys = repository.keys(session, entries)
    return AuditPage.of([AuditEntryOut.of(entry, keys.get(entry.key_id or "")) for entry in entries], has_more)
