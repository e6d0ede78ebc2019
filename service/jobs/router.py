"""`/v1/selection-jobs`: post, poll, list, cancel, and what happened."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response, status
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from service import etags
from service.artifacts import ArtifactStore
from service.audit import service as audit
from service.database import SessionDep, give_back
from service.errors import (
    Conflict,
    Forbidden,
    NotFound,
    Unauthorized,
    Unavailable,
    Unprocessable,
    responses,
)
from service.idempotency.service import Once, OnceDep
from service.jobs import again, following, repository, service
from service.jobs.schemas import EventOut, EventPage, JobRequest, SelectionJobOut, SelectionPlan
from service.jobs.state import TERMINAL, JobStatus
from service.jobs.tables import SelectionJob
from service.pages import AfterJob, Limit, Page
from service.settings import ApiSettings
from service.tenants.caller import Caller
from service.tenants.service import ReadDep, SubmitDep

router = APIRouter(prefix="/selection-jobs", tags=["selection jobs"], responses=responses(Unauthorized, Forbidden))

RETRY_AFTER_SECONDS = "2"


@router.post(
    "",
    status_code=status.HTTP_202_ACCEPTED,
    summary="Post a selection job",
    response_model=SelectionJobOut,
    responses={
        status.HTTP_200_OK: {"model": SelectionPlan, "description": "With `dry_run`: the plan; nothing is created"},
        **responses(Conflict, Unprocessable, Unavailable),
    },
)
def create_job(
    body: JobRequest, request: Request, session: SessionDep, caller: SubmitDep, once: OnceDep
) -> JSONResponse:
    """Answers at once; the job is computed by the workers. Poll `Location` until `status` is succeeded, failed or cancelled."""
    settings: ApiSettings = request.app.state.settings
    store: ArtifactStore = request.app.state.store
    if body.dry_run:
        return once.keep(service.plan(session, caller, body, settings.models, store), status.HTTP_200_OK)
    job = service.create(session, caller, body, settings.models, settings.limits, store)
    audit.record(session, caller, "selection_job.created", job.id, pool=job.pool_id, target=job.target_id)
    return _accepted(session, once, job)


@router.get("", summary="Your jobs, newest first")
def list_jobs(
    session: SessionDep,
    caller: ReadDep,
    limit: Limit = 20,
    after: AfterJob = None,
    status: Annotated[JobStatus | None, Query(description="Only jobs in this state")] = None,
) -> Page[SelectionJobOut]:
    jobs, has_more = service.page(session, caller.tenant_id, after=after, status=status, limit=limit)
    data = service.describe(session, jobs)
    return Page(data=data, has_more=has_more, last_id=data[-1].id if data else None)


@router.get(
    "/{job_id}",
    summary="One job: status, phase and progress",
    response_model=SelectionJobOut,
    responses={**etags.NOT_MODIFIED, **responses(NotFound, Unprocessable)},
)
async def get_job(
    job_id: str,
    request: Request,
    session: SessionDep,
    caller: ReadDep,
    wait: Annotated[
        int, Query(ge=0, le=60, description="Seconds to wait for the job's end; then it is answered as it is")
    ] = 0,
) -> Response:
    """With an `ETag` once the job has ended."""
    job = await run_in_threadpool(_described, session, caller, job_id)
    if wait and job.status not in TERMINAL:
        await give_back(session)
        job = await following.until_ended(request, caller.tenant_id, job_id, wait)
    if job.status in TERMINAL:
        return etags.answer_by_content(request, job)
    headers = {"Retry-After": "0" if wait else RETRY_AFTER_SECONDS}
    return Response(job.model_dump_json(), media_type="application/json", headers=headers)


def _described(session: Session, caller: Caller, job_id: str) -> SelectionJobOut:
    return service.describe(session, [service.require(session, caller.tenant_id, job_id)])[0]


@router.post(
    "/{job_id}/cancel",
    summary="Cancel a job",
    response_model=SelectionJobOut,
    responses=responses(NotFound, Conflict, Unprocessable),
)
def cancel_job(job_id: str, session: SessionDep, caller: SubmitDep, once: OnceDep) -> JSONResponse:
    """Running units stop at their next batch; a job that has ended stays as it is. Safe to repeat."""
    job, cancelled = service.cancel(session, caller.tenant_id, job_id)
    if cancelled:
        audit.record(session, caller, "selection_job.cancelled", job.id)
    return once.keep(service.describe(session, [job])[0], status.HTTP_200_OK)


@router.post(
    "/{job_id}/retry",
    status_code=status.HTTP_202_ACCEPTED,
    summary="Post a failed job again",
    response_model=SelectionJobOut,
    responses=responses(NotFound, Conflict, Unprocessable),
)
def retry_job(job_id: str, request: Request, session: SessionDep, caller: SubmitDep, once: OnceDep) -> JSONResponse:
    """A new job with the same request, parameters, metadata and model. What the first one had computed is found again."""
    state = request.app.state
    job = again.retry(session, caller, job_id, state.settings.models, state.settings.limits, state.store)
    audit.record(session, caller, "selection_job.retried", job.id, retry_of=job_id)
    return _accepted(session, once, job)


@router.post(
    "/{job_id}/reproduce",
    status_code=status.HTTP_202_ACCEPTED,
    summary="Compute a succeeded job again from its provenance",
    response_model=SelectionJobOut,
    responses=responses(NotFound, Conflict, Unprocessable),
)
def reproduce_job(job_id: str, request: Request, session: SessionDep, caller: SubmitDep, once: OnceDep) -> JSONResponse:
    """A new job from the audit record: the same data, model, parameters and seeds, and nothing of what was computed before. Also
    of a deleted job. It fails where the model's files are others; an event `job.reproduction` names what else differs."""
    state = request.app.state
    job = again.reproduce(session, caller, job_id, state.settings.models, state.settings.limits, state.store)
    audit.record(session, caller, "selection_job.reproduced", job.id, reproduces=job_id)
    return _accepted(session, once, job)


def _accepted(session: Session, once: Once, job: SelectionJob) -> JSONResponse:
    headers = {"Location": f"/v1/selection-jobs/{job.id}", "Retry-After": RETRY_AFTER_SECONDS}
    return once.keep(service.describe(session, [job])[0], status.HTTP_202_ACCEPTED, headers)


@router.delete(
    "/{job_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    summary="Delete a finished job",
    responses=responses(NotFound, Conflict),
)
def delete_job(job_id: str, session: SessionDep, caller: SubmitDep) -> None:
    """Its results, units and events are gone; its provenance stays. Safe to repeat."""
    if service.delete(session, caller.tenant_id, job_id):
        audit.record(session, caller, "selection_job.deleted", job_id)


@router.get(
    "/{job_id}/events",
    summary="What happened to a job, oldest first",
    response_model=EventPage,
    responses={
        status.HTTP_200_OK: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        status.HTTP_204_NO_CONTENT: {"description": "A stream of a job that has ended, which has nothing more to send"},
        **responses(NotFound, Unprocessable, Unavailable),
    },
)
def list_events(
    job_id: str,
    request: Request,
    session: SessionDep,
    caller: ReadDep,
    limit: Limit = 100,
    after: Annotated[int, Query(ge=0, lt=2**63, description="`last_id` of the page before")] = 0,
    last_event_id: Annotated[
        int | None, Header(ge=0, lt=2**63, description="Of a stream that broke off: it continues there")
    ] = None,
) -> Any:
    """A page; or with `Accept: text/event-stream` a stream of server-sent events, each with the JSON of an event of a page as its
    `data`. The stream ends when the job has."""
    job = service.require(session, caller.tenant_id, job_id)
    if "text/event-stream" in request.headers.get("accept", ""):
        if "limit" in request.query_params:
            raise Unprocessable("limit goes with pages; leave it out of a stream.", param="limit")
        after = after if last_event_id is None else last_event_id
        if job.status in TERMINAL and not repository.events(session, job_id, after=after, limit=1):
            return Response(status_code=status.HTTP_204_NO_CONTENT)
        return following.EventStream(request, caller.tenant_id, job_id, after)
    events = repository.events(session, job_id, after=after, limit=limit)
    data = [EventOut.model_validate(event) for event in events[:limit]]
    return EventPage(data=data, has_more=len(events) > limit, last_id=data[-1].id if data else None)
