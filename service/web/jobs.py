"""`/jobs`: the jobs of the tenant, newest first."""

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy.orm import Session

from service.auth.authentication import ReadDep
from service.auth.principal import Principal
from service.datasets import repository as datasets
from service.db.engine import SessionDep
from service.http.pagination import AfterJob
from service.jobs import repository, service
from service.ledger.state import TERMINAL, JobStatus
from service.web import timeline
from service.web.admission import logged_in
from service.web.rendering import address, render, render_part

router = APIRouter(include_in_schema=False, dependencies=[Depends(logged_in)])

_ENTRIES = 25


@router.get("/jobs")
def jobs_page(
    request: Request, session: SessionDep, principal: ReadDep, status: str = "", after: AfterJob = None
) -> Response:
    return render(request, "jobs.html", **_listed(session, principal, status, after))


@router.get("/jobs/rows")
def job_rows(
    request: Request, session: SessionDep, principal: ReadDep, status: str = "", after: AfterJob = None
) -> Response:
    """The table, for the page that is open."""
    return render_part(request, "job_rows.html", **_listed(session, principal, status, after))


def _listed(session: Session, principal: Principal, status: str, after: str | None) -> dict[str, Any]:
    wanted = JobStatus(status) if status in set(JobStatus) else None
    found, has_more = repository.page(session, principal.tenant_id, after=after, status=wanted, limit=_ENTRIES)
    jobs = service.describe(session, found)
    now = datetime.now(UTC)
    plans = repository.last_events(session, [job.id for job in jobs if job.status not in TERMINAL], "job.planned")
    return {
        "jobs": jobs,
        "left": {job.id: timeline.of_job(job, plans.get(job.id), now).seconds_left for job in jobs},
        "names": datasets.names(session, principal.tenant_id, {id for job in jobs for id in (job.pool, job.target)}),
        "status": wanted,
        "statuses": list(JobStatus),
        "is_first": after is None,
        "here": address("/jobs/rows", status=wanted, after=after),
        "older": address("/jobs", status=wanted, after=jobs[-1].id) if has_more else None,
        "newest": address("/jobs", status=wanted),
    }
