"""`/v1/selection-jobs`: posting, polling, listing, cancelling and deleting jobs, and their events."""

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response, status
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from service import ledger
from service.audit import service as audit
from service.auth.authentication import ReadDep, SubmitDep
from service.auth.principal import Principal
from service.db.engine import SessionDep, release_connection, run_with_connection
from service.db.reader import Away
from service.http import etags
from service.http.errors import Conflict, Forbidden, NotFound, Unauthorized, Unavailable, Unprocessable, responses
from service.http.pagination import AfterJob, Limit, Page
from service.idempotency.service import IdempotentDep, IdempotentRequest, KeyedDep, UnansweredDep
from service.jobs import naming, queue, reads, repository, rerun, service, streaming, submission
from service.jobs.naming import JobChange, LabelFilter, NameFilter
from service.jobs.queue import QueuePlace
from service.jobs.schemas import EventOut, EventPage, JobRequest, SelectionJobOut, SelectionPlan
from service.jobs.submission import Known
from service.ledger.state import TERMINAL, JobStatus

router = APIRouter(prefix="/selection-jobs", tags=["selection jobs"], responses=responses(Unauthorized, Forbidden))


async def _known(request: Request, session: SessionDep, principal: SubmitDep, idempotent: KeyedDep) -> Known | None:
    """What is known before the body is validated: a request that was answered is answered again, or refused, whatever it asks."""
    try:
        known = await submission.look_up(request, principal, idempotent.key, await _asked(request))
    except Away:
        await run_in_threadpool(idempotent.replay, session)
        return None
    if known is not None and known.answered is not None:
        idempotent.answer_again(known.answered)
    return known


async def _asked(request: Request) -> Mapping[str, Any]:
    """The body, if it is an object."""
    try:
        body = await request.json()
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


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
async def create_job(
    body: JobRequest,
    request: Request,
    session: SessionDep,
    principal: SubmitDep,
    idempotent: KeyedDep,
    known: Annotated[Known | None, Depends(_known)],
) -> JSONResponse:
    """Returns immediately; workers compute the job. Poll `Location` until `status` is succeeded, failed or cancelled."""
    asked = (body, request, session, principal, idempotent)
    if known is None or not known.is_ready or body.dry_run:
        return await run_in_threadpool(submit_any, *asked)
    draft, answer, values = await run_in_threadpool(_drafted, body, request, principal, idempotent, known)
    with suppress(Away):
        if await submission.write_at_once(request, values) is None:
            return answer
    return await run_in_threadpool(_write, request, session, principal, idempotent, draft, answer, values)


def _drafted(
    body: JobRequest, request: Request, principal: Principal, idempotent: IdempotentRequest, known: Known
) -> tuple[service.Draft, JSONResponse, Mapping[str, Any]]:
    settings = request.app.state.settings
    draft = service.draft_on(principal, body, known, settings)
    answer = _answer(draft)
    return draft, answer, service.to_write(principal, draft, settings, idempotent, answer, "selection_job.created")


def _write(
    request: Request,
    session: Session,
    principal: Principal,
    idempotent: IdempotentRequest,
    draft: service.Draft,
    answer: JSONResponse,
    values: Mapping[str, Any],
) -> JSONResponse:
    """Once more, the usual way, which says why it cannot be written."""
    session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})  # one statement is one transaction
    service.create(session, principal, draft, request.app.state.settings, idempotent, values)
    return answer


def submit_any(
    body: JobRequest, request: Request, session: Session, principal: Principal, idempotent: IdempotentRequest
) -> JSONResponse:
    state = request.app.state
    draft = service.draft(session, principal, body, state.settings, state.store)
    if body.dry_run:
        idempotent.begin(session)
        return idempotent.keep(session, service.describe_plan(draft), status.HTTP_200_OK)
    return _create(request, session, principal, idempotent, draft, "selection_job.created")


def _create(
    request: Request,
    session: Session,
    principal: Principal,
    idempotent: IdempotentRequest,
    draft: service.Draft,
    action: str,
    **detail: str,
) -> JSONResponse:
    """Writes the job, its audit entry and the answer in one transaction, and commits it."""
    settings, job = request.app.state.settings, draft.job
    if draft.new_target is not None:
        idempotent.begin(session)
        service.import_target(session, principal, draft, settings)
    if job.created_at is None:
        job.created_at = submission.now(session)
    answer = _answer(draft)
    values = service.to_write(principal, draft, settings, idempotent, answer, action, **detail)
    service.create(session, principal, draft, settings, idempotent, values)
    session.commit()
    return answer


def _answer(draft: service.Draft) -> JSONResponse:
    headers = {"Location": f"/v1/selection-jobs/{draft.job.id}", "Retry-After": reads.RETRY_AFTER_SECONDS}
    return JSONResponse(service.describe_new(draft).model_dump(mode="json"), status.HTTP_202_ACCEPTED, headers)


@router.get("", summary="List your jobs, newest first", response_model=Page[SelectionJobOut])
def list_jobs(
    session: SessionDep,
    principal: ReadDep,
    limit: Limit = 20,
    after: AfterJob = None,
    status: Annotated[JobStatus | None, Query(description="Only jobs in this state")] = None,
    name: NameFilter = None,
    label: LabelFilter = None,
) -> Response:
    """Filters narrow it together."""
    jobs, has_more = repository.page(
        session, principal.tenant_id, after=after, status=status, name=name, labels=label or (), limit=limit
    )
    return reads.page_answer(service.describe(session, jobs), has_more)


@router.get(
    "/{job_id}",
    summary="Get a job: status, phase and progress",
    response_model=SelectionJobOut,
    responses={**etags.NOT_MODIFIED, **responses(NotFound, Unprocessable)},
)
async def get_job(
    job_id: str,
    request: Request,
    session: SessionDep,
    principal: ReadDep,
    wait: Annotated[
        int, Query(ge=0, le=60, description="Seconds to wait for the job to end before its current state is returned")
    ] = 0,
) -> Response:
    """With an `ETag` once the job has ended."""
    job = await reads.current(request, job_id)
    if job is None:
        job = await run_in_threadpool(
            lambda: service.describe(session, [ledger.require_job(session, principal.tenant_id, job_id)])[0]
        )
    if wait and job.status not in TERMINAL:
        await release_connection(session)
        await streaming.until_ended(request, principal, job_id, wait)
        job = await reads.current(request, job_id)
    if job is None:
        describe = partial(service.describe_live, request.app.state.sessions, principal, job_id)
        job = await run_with_connection(request, describe)
    return reads.job_answer(request, job, wait)


@router.get(
    "/{job_id}/queue",
    summary="Get a job's place in the queue and its estimated start",
    responses=responses(NotFound),
)
def get_queue_place(job_id: str, request: Request, session: SessionDep, principal: ReadDep) -> QueuePlace:
    """From what plans say and is done by now. It looks through all jobs that have not ended: ask now and then, and poll the
    job itself."""
    job = ledger.require_job(session, principal.tenant_id, job_id)
    return queue.place(session, request.app.state.settings.ledger, job)


@router.patch(
    "/{job_id}",
    summary="Change a job's name and labels",
    response_model=SelectionJobOut,
    responses=responses(NotFound, Unprocessable),
)
def change_job(job_id: str, body: JobChange, session: SessionDep, principal: SubmitDep) -> SelectionJobOut:
    """In any state of the job. Nothing that is computed depends on them, and nothing that is stored of a result contains them;
    the `ETag` of a job that has ended changes. Safe to repeat."""
    return service.describe(session, [naming.change(session, principal, job_id, body)])[0]


@router.post(
    "/{job_id}/cancel",
    summary="Cancel a job",
    response_model=SelectionJobOut,
    responses=responses(NotFound, Conflict, Unprocessable),
)
def cancel_job(job_id: str, session: SessionDep, principal: SubmitDep, idempotent: IdempotentDep) -> JSONResponse:
    """Running units stop at their next batch; a job that has ended is not changed. Safe to repeat."""
    job, cancelled = service.cancel(session, principal.tenant_id, job_id)
    if cancelled:
        audit.record(session, principal, "selection_job.cancelled", job.id)
    return idempotent.keep(session, service.describe(session, [job])[0], status.HTTP_200_OK)


@router.post(
    "/{job_id}/retry",
    status_code=status.HTTP_202_ACCEPTED,
    summary="Retry a failed or cancelled job",
    response_model=SelectionJobOut,
    responses=responses(NotFound, Conflict, Unprocessable),
)
def retry_job(
    job_id: str, request: Request, session: SessionDep, principal: SubmitDep, idempotent: UnansweredDep
) -> JSONResponse:
    """A new job with the same request, parameters, name, labels, metadata and model. What the first one computed is reused."""
    state = request.app.state
    draft = rerun.retry(session, principal, job_id, state.settings.models)
    return _create(request, session, principal, idempotent, draft, "selection_job.retried", retry_of=job_id)


@router.post(
    "/{job_id}/reproduce",
    status_code=status.HTTP_202_ACCEPTED,
    summary="Reproduce a succeeded job from its provenance",
    response_model=SelectionJobOut,
    responses=responses(NotFound, Conflict, Unprocessable),
)
def reproduce_job(
    job_id: str, request: Request, session: SessionDep, principal: SubmitDep, idempotent: UnansweredDep
) -> JSONResponse:
    """A new job from the audit record: the same data, model, parameters and seeds, reusing nothing computed before. Also
    of a deleted job. It fails if the model's files differ; an event `job.reproduction` lists all other differences."""
    state = request.app.state
    draft = rerun.reproduce(session, principal, job_id, state.settings.models)
    return _create(request, session, principal, idempotent, draft, "selection_job.reproduced", reproduces=job_id)


@router.delete(
    "/{job_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    summary="Delete a finished job",
    responses=responses(NotFound, Conflict),
)
def delete_job(job_id: str, session: SessionDep, principal: SubmitDep) -> None:
    """Its results, units and events are deleted; its provenance is kept. Safe to repeat."""
    if service.delete(session, principal.tenant_id, job_id):
        audit.record(session, principal, "selection_job.deleted", job_id)


@router.get(
    "/{job_id}/events",
    summary="List or stream the events of a job, oldest first",
    response_model=EventPage,
    responses={
        status.HTTP_200_OK: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        status.HTTP_204_NO_CONTENT: {"description": "The job has ended, and the stream has nothing more to send"},
        **responses(NotFound, Unprocessable, Unavailable),
    },
)
def list_events(
    job_id: str,
    request: Request,
    session: SessionDep,
    principal: ReadDep,
    limit: Limit = 100,
    after: Annotated[int, Query(ge=0, lt=2**63, description="`last_id` of the previous page")] = 0,
    last_event_id: Annotated[
        int | None,
        Header(ge=0, lt=2**63, description="The last event received on an interrupted stream, which resumes after it"),
    ] = None,
) -> Any:
    """A page, or with `Accept: text/event-stream` a stream of server-sent events, each with the JSON of an event as its
    `data`. The stream ends when the job ends."""
    job = ledger.require_job(session, principal.tenant_id, job_id)
    if "text/event-stream" in request.headers.get("accept", ""):
        if "limit" in request.query_params:
            raise Unprocessable("limit applies to pages; omit it for a stream.", param="limit")
        after = after if last_event_id is None else last_event_id
        if job.status in TERMINAL and not repository.events(session, job_id, after=after, limit=1)[0]:
            return Response(status_code=status.HTTP_204_NO_CONTENT)
        return streaming.EventStream(request, principal, job_id, after)
    events, has_more = repository.events(session, job_id, after=after, limit=limit)
    return reads.events_answer([EventOut.model_validate(event) for event in events], has_more)
