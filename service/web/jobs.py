"""`/jobs`: the jobs of the tenant."""

from fastapi import APIRouter, Depends, Request, Response

from service.auth.authentication import ReadDep
from service.db.engine import SessionDep
from service.jobs import repository, service
from service.web.admission import logged_in
from service.web.rendering import render

router = APIRouter(include_in_schema=False, dependencies=[Depends(logged_in)])

_ENTRIES = 50


@router.get("/jobs")
def jobs_page(request: Request, session: SessionDep, principal: ReadDep) -> Response:
    jobs, _ = repository.page(session, principal.tenant_id, after=None, status=None, limit=_ENTRIES)
    return render(request, "jobs.html", jobs=service.describe(session, jobs))
