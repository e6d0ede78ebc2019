"""`/workers`: who computes, for admins."""

from fastapi import APIRouter, Depends, Request, Response

from service.auth.authentication import AdminDep
from service.db.engine import SessionDep
from service.web.admission import logged_in
from service.web.rendering import render
from service.workers import repository
from service.workers.router import After
from service.workers.schemas import shown

router = APIRouter(include_in_schema=False, dependencies=[Depends(logged_in)])

_ENTRIES = 100


@router.get("/workers")
def workers_page(request: Request, session: SessionDep, principal: AdminDep, after: After = None) -> Response:
    lease_seconds = request.app.state.settings.ledger.lease_seconds
    found, has_more = repository.page(
        session, principal.tenant_id, lease_seconds=lease_seconds, after=after, limit=_ENTRIES
    )
    return render(request, "workers.html", workers=[shown(row) for row in found], has_more=has_more)
