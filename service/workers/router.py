"""`/v1/workers`: who computes."""

from typing import Annotated

from fastapi import APIRouter, Query, Request

from service.auth.authentication import AdminDep
from service.db.engine import SessionDep
from service.http.errors import Forbidden, Unauthorized, Unprocessable, responses
from service.http.pagination import Limit
from service.settings import ApiSettings
from service.workers import repository
from service.workers.schemas import WorkerPage, shown

router = APIRouter(tags=["workers"], responses=responses(Unauthorized, Forbidden, Unprocessable))

After = Annotated[
    str | None,
    Query(pattern=r"^[\x21-\x7e]{1,255}$", description="`last_id` of the previous page", examples=["gpu-3:4711"]),
]


@router.get("/workers", summary="List the workers")
def list_workers(
    request: Request, session: SessionDep, principal: AdminDep, limit: Limit = 100, after: After = None
) -> WorkerPage:
    """Needs a key with the scope `admin`. Those that have not reported their end, if they were seen within a day."""
    settings: ApiSettings = request.app.state.settings
    found, has_more = repository.page(
        session, principal.tenant_id, lease_seconds=settings.ledger.lease_seconds, after=after, limit=limit
    )
    return WorkerPage.of([shown(row) for row in found], has_more)
