"""`/jobs`: the jobs of the tenant, newest first."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from sqlalchemy.orm import Session

from service.auth.authentication import ReadDep
from service.auth.principal import Principal
from service.datasets import repository as datasets
from service.db.engine import SessionDep
from service.http.pagination import AfterJob
from service.jobs import repository, service
from service.ledger.state import TERMINAL, JobStatus
from service.names import Name
from service.web import timeline
from service.web.admission import logged_in
from service.web.rendering import address, render, render_part

router = APIRouter(include_in_schema=False, dependencies=[Depends(logged_in)])

_ENTRIES = 25

Text = Annotated[Name, Query(max_length=250)]


@dataclass(frozen=True, slots=True)
class Filters:
    """As they are written; what is no filter finds nothing, or is none."""

    status: str = ""
    name: Text = ""
    label: Text = ""

    def __post_init__(self) -> None:
        for field in ("name", "label"):
            object.__setattr__(self, field, getattr(self, field).strip())

    @property
    def wanted(self) -> JobStatus | None:
        return JobStatus(self.status) if self.status in set(JobStatus) else None

    @property
    def are_set(self) -> bool:
        return bool(self.wanted or self.name or self.label)


FiltersDep = Annotated[Filters, Depends()]


@router.get("/jobs")
def jobs_page(
    request: Request, session: SessionDep, principal: ReadDep, filters: FiltersDep, after: AfterJob = None
) -> Response:
    return render(request, "jobs.html", **_listed(session, principal, filters, after))


@router.get("/jobs/rows")
def job_rows(
    request: Request, session: SessionDep, principal: ReadDep, filters: FiltersDep, after: AfterJob = None
) -> Response:
    """The table, for the page that is open."""
    return render_part(request, "job_rows.html", **_listed(session, principal, filters, after))


def _listed(session: Session, principal: Principal, filters: Filters, after: str | None) -> dict[str, Any]:
    found, has_more = repository.page(
        session,
        principal.tenant_id,
        after=after,
        status=filters.wanted,
        name=filters.name or None,
        labels=[filters.label] if filters.label else (),
        limit=_ENTRIES,
    )
    jobs = service.describe(session, found)
    now = datetime.now(UTC)
    plans = repository.last_events(session, [job.id for job in jobs if job.status not in TERMINAL], "job.planned")
    query = {"status": filters.wanted, "name": filters.name, "label": filters.label}
    return {
        "jobs": jobs,
        "left": {job.id: timeline.of_job(job, plans.get(job.id), now).seconds_left for job in jobs},
        "names": datasets.names(session, principal.tenant_id, {id for job in jobs for id in (job.pool, job.target)}),
        "filters": filters,
        "statuses": list(JobStatus),
        "is_first": after is None,
        "here": address("/jobs/rows", **query, after=after),
        "older": address("/jobs", **query, after=jobs[-1].id) if has_more else None,
        "newest": address("/jobs", **query),
    }
