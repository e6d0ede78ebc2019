"""`/jobs/{id}`: one job, live: its stages, its events, and what can be done with it."""

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from sqlalchemy.orm import Session

from service import ledger
from service.auth.authentication import ReadDep, SubmitDep
from service.auth.principal import Principal
from service.datasets import repository as datasets
from service.db.engine import SessionDep
from service.idempotency.service import IdempotentRequest
from service.jobs import queue, repository, service
from service.jobs import router as api
from service.jobs.schemas import EventOut
from service.ledger.state import TERMINAL, JobStatus
from service.web import snippets, timeline
from service.web.admission import FormDep, logged_in
from service.web.rendering import render, render_part, see_other

router = APIRouter(prefix="/jobs/{job_id}", include_in_schema=False, dependencies=[Depends(logged_in)])

_NEWEST_EVENTS, _EVENTS = 12, 100
_LOSS_EVENTS = 200


@router.get("")
def job_page(job_id: str, request: Request, session: SessionDep, principal: ReadDep) -> Response:
    shown = _shown(request, session, principal, job_id)
    request_sent = ledger.require_job(session, principal.tenant_id, job_id).request
    host = f"{request.url.scheme}://{request.url.netloc}"
    return render(request, "job.html", snippets=snippets.of_request(request_sent, host), **shown)


@router.get("/live")
def job_part(job_id: str, request: Request, session: SessionDep, principal: ReadDep) -> Response:
    """What changes of the page while the job goes on."""
    shown = _shown(request, session, principal, job_id)
    return render_part(request, "job_live.html", is_final=shown["job"].status in TERMINAL, **shown)


@router.get("/events")
def job_events(
    job_id: str,
    request: Request,
    session: SessionDep,
    principal: ReadDep,
    last_event_id: Annotated[int | None, Header(ge=0, lt=2**63)] = None,
) -> Any:
    """The API's stream, for the page that is open."""
    return api.list_events(job_id, request, session, principal, after=0, last_event_id=last_event_id)


@router.get("/log")
def job_log(
    job_id: str,
    request: Request,
    session: SessionDep,
    principal: ReadDep,
    before: Annotated[int | None, Query(ge=1, lt=2**63)] = None,
) -> Response:
    """All events, newest first."""
    job = ledger.require_job(session, principal.tenant_id, job_id)
    found, has_more = repository.newest_events(session, job.id, before=before, limit=_EVENTS)
    events = [EventOut.model_validate(event) for event in found]
    return render(request, "job_log.html", job=job, events=events, has_more=has_more, most=100_000)


@router.post("/cancel")
def cancel(job_id: str, request: Request, session: SessionDep, principal: SubmitDep, form: FormDep) -> Response:  # noqa: ARG001
    api.cancel_job(job_id, session, principal, _once(request, principal))
    return see_other(f"/jobs/{job_id}")


@router.post("/retry")
def retry(job_id: str, request: Request, session: SessionDep, principal: SubmitDep, form: FormDep) -> Response:  # noqa: ARG001
    answer = api.retry_job(job_id, request, session, principal, _once(request, principal))
    return see_other(answer.headers["Location"].replace("/v1/selection-jobs/", "/jobs/"))


@router.post("/delete")
def delete(job_id: str, session: SessionDep, principal: SubmitDep, form: FormDep) -> Response:  # noqa: ARG001
    api.delete_job(job_id, session, principal)
    return see_other("/jobs")


def _once(request: Request, principal: Principal) -> IdempotentRequest:
    """Of a call without a key."""
    return IdempotentRequest(request.app.state.encryptor, principal, None, b"")


def _shown(request: Request, session: Session, principal: Principal, job_id: str) -> dict[str, Any]:
    row = ledger.require_job(session, principal.tenant_id, job_id)
    job = service.describe(session, [row])[0]
    waits = job.status == JobStatus.QUEUED
    plan = repository.last_event(session, job_id, "job.planned")
    events, has_more = repository.newest_events(session, job_id, limit=_NEWEST_EVENTS)
    warmup = repository.events_of_kind(session, job_id, "warmup.step", limit=_LOSS_EVENTS)
    return {
        "job": job,
        "plan": plan,
        "place": queue.place(session, request.app.state.settings.ledger, row) if waits else None,
        "timeline": timeline.of_job(job, plan, datetime.now(UTC)),
        "events": [EventOut.model_validate(event) for event in events],
        "has_more": has_more,
        "losses": [loss for data in warmup for loss in data.get("losses", [])],
        "names": datasets.names(session, principal.tenant_id, {job.pool, job.target}),
        "can_cancel": job.status in (JobStatus.QUEUED, JobStatus.RUNNING),
        "can_retry": job.status in (JobStatus.FAILED, JobStatus.CANCELLED),
        "is_over": job.status in TERMINAL,
        "most": 300,
    }
