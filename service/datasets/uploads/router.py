"""Uploads in parts over HTTP."""

from functools import partial
from typing import IO, Any

from fastapi import APIRouter, BackgroundTasks, Request, status
from fastapi.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from service.audit import service as audit
from service.auth.authentication import ReadDep, SubmitDep, require_live
from service.auth.principal import Principal
from service.datasets.receiving import received
from service.datasets.tables import Upload
from service.datasets.uploads import files, repository, service
from service.datasets.uploads.schemas import PartNumber, UploadOut, UploadPage, UploadRequest
from service.db.engine import SessionDep, release_connection
from service.http.bodies import BodyBudget, set_budget
from service.http.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    NotFound,
    RequestTimeout,
    TooLarge,
    Unauthorized,
    Unavailable,
    Unprocessable,
    responses,
)
from service.http.pagination import AfterUpload, Limit
from service.idempotency.service import IdempotentDep
from service.settings import ApiSettings

router = APIRouter(prefix="/uploads", tags=["datasets"], responses=responses(Unauthorized, Forbidden))

_PART: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    summary="Begin an upload in parts, or find the one that was begun",
    response_model=UploadOut,
    responses={
        200: {
            "model": UploadOut,
            "description": "Your key has begun this upload before: send the parts from `received` on",
        },
        **responses(Conflict, TooLarge, Unprocessable),
    },
)
def begin_upload(
    request: Request, body: UploadRequest, principal: SubmitDep, session: SessionDep, idempotent: IdempotentDep
) -> JSONResponse:
    """For large files and bad lines: what was received stays when a connection breaks. The same size and sha256 again give the
    same upload, however the first attempt ended.

    Send the parts in order with PUT, then make a dataset: POST /v1/datasets?upload=ID. Until then its bytes count into the key's
    `stored_bytes`.
    """
    settings: ApiSettings = request.app.state.settings
    upload, is_new = service.begin(session, principal, settings, body)
    if is_new:
        audit.record(session, principal, "upload.created", upload.id, bytes=upload.bytes)
    return idempotent.keep(session, _shown(request, upload), status.HTTP_201_CREATED if is_new else status.HTTP_200_OK)


@router.get("", summary="List uploads in parts, newest first", responses=responses(Unprocessable))
def list_uploads(
    request: Request, principal: ReadDep, session: SessionDep, limit: Limit = 20, after: AfterUpload = None
) -> UploadPage:
    """Those of which no dataset was made yet."""
    uploads, has_more = repository.page(session, principal.tenant_id, after, limit)
    return UploadPage.of([_shown(request, upload) for upload in uploads], has_more)


@router.get("/{upload_id}", summary="One upload in parts", responses=responses(NotFound))
def get_upload(request: Request, upload_id: str, principal: ReadDep, session: SessionDep) -> UploadOut:
    return _shown(request, service.find(session, principal.tenant_id, upload_id))


@router.put(
    "/{upload_id}/parts/{number}",
    summary="Send the next part",
    responses=responses(BadRequest, NotFound, RequestTimeout, Conflict, TooLarge, Unprocessable, Unavailable),
    openapi_extra=_PART,
)
async def put_part(
    request: Request, upload_id: str, number: PartNumber, principal: SubmitDep, session: SessionDep
) -> UploadOut:
    """The body is the part alone. It is kept whole or not at all. After a broken connection, or 409 `part_not_next`, GET the
    upload: its `received` is the next."""
    upload = await run_in_threadpool(service.find, session, principal.tenant_id, upload_id)
    service.require_next(upload, number)
    # No connection and no transaction is kept while the part comes.
    await release_connection(session)
    state, size = request.app.state, service.part_size(upload, number)
    limits = state.settings.uploads
    set_budget(request, BodyBudget(size, limits.idle_seconds, state.settings.requests.bytes_per_second))
    async with state.shares.uploads.taken(principal.tenant_id), received(request, limits) as (content, _):
        return await run_in_threadpool(partial(_keep_part, request, principal, upload, number, content))


def _keep_part(request: Request, principal: Principal, upload: Upload, number: int, content: IO[bytes]) -> UploadOut:
    state, key = request.app.state, files.part_key(upload.id, number)
    service.require_size(upload, number, content.seek(0, 2))
    files.keep(state.store, key, content)
    # Only now: a part that counts is there. One that does not is replaced by the next attempt, or removed with the upload.
    with state.sessions.begin() as session:
        require_live(session, principal)
        is_counted = repository.count_part(session, upload.id, number)
        found = repository.find(session, principal.tenant_id, upload.id)
    if found is None:  # deleted meanwhile, and its parts before this one came
        state.store.delete(key)
        raise service.not_found()
    if not is_counted:
        raise service.not_next(found)
    return _shown(request, found)


@router.delete(
    "/{upload_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    summary="Delete an upload in parts",
    responses=responses(NotFound),
)
def delete_upload(
    request: Request, upload_id: str, principal: SubmitDep, session: SessionDep, background: BackgroundTasks
) -> None:
    """What has come of it is removed; datasets that were made of uploads stay."""
    upload = service.find(session, principal.tenant_id, upload_id)
    service.remove(session, upload)
    audit.record(session, principal, "upload.deleted", upload.id)
    # Runs after the response, hence after the commit.
    background.add_task(files.remove, request.app.state.store, upload)


def _shown(request: Request, upload: Upload) -> UploadOut:
    return service.shown(upload, request.app.state.settings.retention.uploads_hours)
