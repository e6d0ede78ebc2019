"""`GET /v1/datasets/{id}/rows`, with a model and without."""

import asyncio
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response, status
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from service.auth.authentication import ReadDep, require_live
from service.auth.principal import Principal
from service.datasets import service as datasets
from service.db.engine import SessionDep, Sessions, release_connection, run_with_connection
from service.http.errors import (
    Conflict,
    Forbidden,
    Gone,
    NotFound,
    Unauthorized,
    Unavailable,
    Unprocessable,
    responses,
)
from service.http.pagination import AfterNumber
from service.previews import service
from service.previews.schemas import (
    MaxLengthQuery,
    ModelQuery,
    PendingRows,
    ReasoningQuery,
    Row,
    RowLimit,
    RowPage,
    TemplateArgumentsQuery,
    WaitQuery,
)
from service.previews.service import Wanted
from service.tasks import TaskState

router = APIRouter(prefix="/datasets", tags=["datasets"], responses=responses(Unauthorized, Forbidden))


@router.get(
    "/{dataset_id}/rows",
    summary="List the rows of a dataset, in order, also as a model sees them",
    response_model=RowPage,
    responses={
        status.HTTP_202_ACCEPTED: {
            "model": PendingRows,
            "description": "With `model`: a worker is yet to render the rows; repeat the request after `Retry-After`",
        },
        **responses(NotFound, Conflict, Gone, Unprocessable, Unavailable),
    },
)
async def list_rows(
    request: Request,
    dataset_id: str,
    principal: ReadDep,
    session: SessionDep,
    limit: RowLimit = 20,
    after: AfterNumber = None,
    model: ModelQuery = None,
    reasoning: ReasoningQuery = None,
    template_arguments: TemplateArgumentsQuery = None,
    max_length: MaxLengthQuery = None,
    wait: WaitQuery = 0,
) -> Any:
    """Each message says whether the loss `counts` it. With `model` each row has what a job with that model would read: the text,
    the spans that the loss counts, its tokens before and after the cut to `max_length`, or why it would take no part."""
    state = request.app.state
    start = 0 if after is None else after + 1
    arguments = service.arguments(reasoning, template_arguments, max_length, has_model=model is not None)
    if model is None:
        samples, has_more = await run_in_threadpool(
            datasets.rows, session, state.store, principal.tenant_id, dataset_id, start, limit
        )
        return RowPage.of([Row.model_validate(sample) for sample in samples], has_more, "index")
    dataset = await run_in_threadpool(datasets.find_ready, session, principal.tenant_id, dataset_id)
    if start >= dataset.row_count:
        return RowPage.of([], False, "index")
    session.expunge(dataset)
    await release_connection(session)  # the hub may be asked, and a worker waited for
    wanted = await run_in_threadpool(service.wanted, state.settings.models, dataset, start, limit, model, arguments)
    look = partial(_look, request, principal, wanted)
    answer = await run_with_connection(request, look)
    if wait and answer.status_code == status.HTTP_202_ACCEPTED:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait
        async with (
            state.shares.waiters.taken(principal.tenant_id),
            state.notifications.waiting(wanted.subject, request) as waiter,
        ):
            while (
                (answer := await run_with_connection(request, look)).status_code == status.HTTP_202_ACCEPTED
                and not waiter.gone
                and (left := deadline - loop.time()) > 0
            ):
                await waiter.wait(left)
    return answer


def _look(request: Request, principal: Principal, wanted: Wanted) -> Response:
    """The answer as it is now; the task that renders the rows is there afterwards."""
    state = request.app.state
    sessions: Sessions = state.sessions
    with sessions.begin() as session:
        require_live(session, principal)
        datasets.find(session, principal.tenant_id, wanted.dataset_id)
        task = service.find_or_start(session, principal, wanted)
        if task.state == TaskState.FAILED:
            raise service.failure(task)
        if task.state != TaskState.SUCCEEDED:
            pending = service.pending(session, task, state.settings.ledger.lease_seconds)
            headers = {"Retry-After": service.RETRY_SECONDS}
            return JSONResponse(pending.model_dump(), status.HTTP_202_ACCEPTED, headers)
        result = task.result or {}
    return Response(service.page(state.store, wanted, result).model_dump_json(), media_type="application/json")
