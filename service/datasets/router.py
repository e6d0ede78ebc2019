"""Datasets over HTTP."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import IO, Annotated, Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, BackgroundTasks, Query, Request, Response, status
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from sqlalchemy.orm import Session
from starlette.background import BackgroundTask
from starlette.responses import StreamingResponse

from service.audit import service as audit
from service.auth.authentication import ReadDep, SubmitDep, live_check, require_live
from service.auth.principal import Principal
from service.auth.quotas import QuotaExceeded
from service.datasets import hub, imports, repository, service, waiting
from service.datasets.bad_rows import OnBadRow
from service.datasets.convert import convert, sha256_of
from service.datasets.import_schemas import ImportRequest
from service.datasets.receiving import received
from service.datasets.rows.forms import Form
from service.datasets.rows.options import RowOptions
from service.datasets.schemas import (
    ColumnsQuery,
    DatasetName,
    DatasetOut,
    DatasetPage,
    FormQuery,
    OnBadRowQuery,
    SkippedRow,
    TemplateQuery,
)
from service.datasets.storage import Content
from service.datasets.tables import Upload
from service.datasets.uploads import files as parts
from service.datasets.uploads import service as uploading
from service.datasets.uploads.schemas import UploadQuery
from service.db.engine import SessionDep, release_connection
from service.http.bodies import BodyBudget, has_body, set_budget
from service.http.downloads import Download
from service.http.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    Gone,
    NotFound,
    TooLarge,
    Unauthorized,
    Unavailable,
    Unprocessable,
    malformed,
    responses,
)
from service.http.pagination import AfterDataset, Limit
from service.idempotency.service import IdempotentRequest, KeyHeader, is_answered, request_digest
from service.settings import ApiSettings, LimitSettings
from service.shares import Shares
from service.storage.tempdirs import temporary_directory

Convert = Callable[..., Content]
"""`convert` with all but the folder."""

router = APIRouter(prefix="/datasets", tags=["datasets"], responses=responses(Unauthorized, Forbidden))

RETRY_AFTER_SECONDS = "2"

_ROW = '{"id": "flan-17", "source": "flan", "prompt": "Name a prime.", "completion": "Seven."}\n'
_SKIPPED = SkippedRow.model_json_schema()
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "JSONL, JSON (an array of rows, one row, or an object whose `data` are the rows), CSV or TSV with a line"
        " of names, Parquet, Arrow (file or stream) or plain text, each as it is or packed with gzip or zstd. The content tells"
        " which; where it cannot, the ending of the file's or the dataset's name does (.csv, .tsv, .txt, .md), or `format=text`."
        " The media type is ignored. Archives (zip, tar) are refused.",
        "content": {
            "application/jsonl": {"schema": {"type": "string"}, "example": _ROW},
            "application/json": {
                "schema": {
                    "anyOf": [
                        {"type": "array", "items": {"type": "object"}},
                        {"$ref": "#/components/schemas/ImportRequest"},
                    ]
                }
            },
            "text/csv": {"schema": {"type": "string"}},
            "text/tab-separated-values": {"schema": {"type": "string"}},
            "text/plain": {"schema": {"type": "string"}},
            "application/vnd.apache.parquet": _BINARY,
            "application/vnd.apache.arrow.file": _BINARY,
            "application/vnd.apache.arrow.stream": _BINARY,
            "application/gzip": _BINARY,
            "application/zstd": _BINARY,
            "multipart/form-data": {
                "schema": {"type": "object", "required": ["file"], "properties": {"file": _BINARY["schema"]}}
            },
        },
    }
}


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    summary="Upload a dataset, or import one from the hub",
    response_model=DatasetOut,
    responses={
        status.HTTP_202_ACCEPTED: {"model": DatasetOut, "description": "Of an import: a worker has yet to do it"},
        **responses(BadRequest, Conflict, TooLarge, Unprocessable, Unavailable),
    },
    openapi_extra=_UPLOAD_BODY,
)
async def upload(
    request: Request,
    principal: SubmitDep,
    session: SessionDep,
    name: DatasetName | None = None,
    form: FormQuery = Form.AUTO,
    columns: ColumnsQuery = None,
    template: TemplateQuery = None,
    on_bad_row: OnBadRowQuery = OnBadRow.REFUSE,
    upload_id: UploadQuery = None,
    idempotency_key: KeyHeader = None,
) -> Response:
    """Stores the rows of the file, in order, as a dataset: all of them or none, or with `on_bad_row=skip` those that can be used.

    A row has `messages` (`[{"role", "content"}]`, with at least one reply of the assistant), or `conversations`, `prompt` and
    `completion`, `instruction` and `output`, `question` and `answer`, `inputs` and `targets`, or `text`, or what `columns` names
    or `template` makes; optionally an `id`, unique in the dataset, and a `source` (else `dataset`), by which results are grouped.
    A null counts as absent; other fields are left alone. If rows are invalid, the error `invalid_rows` names the first 20 by line
    (in JSON documents, Parquet and Arrow by row), from 1.

    The answer says what was taken: of which columns, in how many rows (`detected`), and how many rows were `skipped`.

    Large files are better sent in parts first (POST /v1/uploads), and named here by `upload` in place of a body.

    Without `name`, and with a body of `application/json`, `{"hub": {"id", "revision", "config", "split", ...}}` imports a split
    of a dataset on the Hugging Face Hub: the answer is 202, and GET /v1/datasets/{id} says when it is `ready`, or why it
    `failed`.
    """
    if name is None:
        return await _import(request, principal, session, idempotency_key)
    options = RowOptions.parse(form, columns, template)
    state = request.app.state
    settings: ApiSettings = state.settings
    shares: Shares = state.shares
    uploads, tenant = settings.uploads, principal.tenant_id
    converted = partial(convert, options=options, limits=uploads, on_bad_row=on_bad_row)
    # Apart from the threads that answer other requests, which a few long conversions would otherwise use up.
    apart = CapacityLimiter(1)
    if upload_id is not None:
        if has_body(request):
            raise BadRequest("upload: send either a body or the id of an upload, not both.", param="upload")
        await release_connection(session)
        async with shares.uploads.taken(tenant), shares.readers.waited_for(tenant):
            named = partial(converted, name=name)
            return await run_sync(
                _keep_parts, request, upload_id, principal, idempotency_key, name, named, limiter=apart
            )
    await run_in_threadpool(_check_room, session, principal, settings.limits, idempotency_key)
    # An upload may last for hours, and its conversion for minutes: no connection and no transaction is kept meanwhile.
    await release_connection(session)
    set_budget(request, BodyBudget(None, uploads.idle_seconds, settings.requests.bytes_per_second))
    async with (
        shares.uploads.taken(tenant),
        received(request, uploads) as (file, file_name),
        shares.readers.waited_for(tenant),
    ):
        named = partial(converted, file, name=file_name if "." in file_name else name)
        return await run_sync(_keep_body, request, file, principal, idempotency_key, name, named, limiter=apart)


async def _import(request: Request, principal: Principal, session: Session, idempotency_key: str | None) -> Response:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" or request.query_params:
        raise Unprocessable(
            "name: an upload needs a name: POST /v1/datasets?name=... with the file as the body. An import from the hub has no"
            ' query and the media type application/json: {"hub": {"id": "owner/name", "split": "train"}}.',
            param="name",
        )
    content = await request.body()
    try:
        wanted = ImportRequest.model_validate(json.loads(content))
    except json.JSONDecodeError as error:
        raise malformed(content, error.pos, error.msg) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise malformed(content, 0, str(error)) from error
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from error
    wanted.hub.row_options()
    digest = request_digest(request, hashlib.sha256(content).digest())
    idempotent = IdempotentRequest(request.app.state.encryptor, principal, idempotency_key, digest)
    return await run_in_threadpool(create_import, request, principal, session, idempotent, wanted)


def create_import(
    request: Request, principal: Principal, session: Session, idempotent: IdempotentRequest, wanted: ImportRequest
) -> Response:
    settings: ApiSettings = request.app.state.settings
    idempotent.replay(session)
    service.check_quota(session, principal, settings.limits, 1)
    session.commit()  # no transaction is open while the hub is asked
    commit = hub.commit_of(wanted.hub, settings.datasets)
    idempotent.begin(session)
    dataset = imports.create(session, principal, settings, wanted.hub, commit, wanted.name)
    audit.record(session, principal, "dataset.imported", dataset.id, hub=wanted.hub.id, commit=commit)
    headers = {"Location": f"{request.url.path}/{dataset.id}", "Retry-After": RETRY_AFTER_SECONDS}
    return idempotent.keep(session, imports.describe(session, [dataset])[0], status.HTTP_202_ACCEPTED, headers)


def _check_room(session: Session, principal: Principal, limits: LimitSettings, idempotency_key: str | None) -> None:
    """Before a byte is read; but who may store nothing more is still told again what was answered before."""
    try:
        service.check_quota(session, principal, limits, 1)
    except QuotaExceeded:
        if idempotency_key is None or not is_answered(session, principal, idempotency_key):
            raise


def _keep_body(
    request: Request,
    file: IO[bytes],
    principal: Principal,
    idempotency_key: str | None,
    name: str,
    converted: Convert,
) -> Response:
    digest = b""
    if idempotency_key is not None:
        digest = request_digest(request, sha256_of(file))
    idempotent = IdempotentRequest(request.app.state.encryptor, principal, idempotency_key, digest)
    with request.app.state.sessions() as session:
        idempotent.replay(session)
    return _keep(request, principal, idempotent, name, converted)


def _keep_parts(
    request: Request,
    upload_id: str,
    principal: Principal,
    idempotency_key: str | None,
    name: str,
    converted: Convert,
) -> Response:
    state = request.app.state
    # The id, in the query, stands for the content.
    idempotent = IdempotentRequest(state.encryptor, principal, idempotency_key, request_digest(request, b""))
    with state.sessions() as session:
        idempotent.replay(session)
    try:
        with state.sessions() as session:
            whole = uploading.find_whole(session, principal.tenant_id, upload_id)
        with (
            parts.Reading(state.sessions, whole) as reading,
            parts.assembled(state.sessions, state.store, whole, reading.note) as file,
        ):
            named = partial(converted, file, report=reading.note)
            answer = _keep(request, principal, idempotent, name, named, whole)
    except (NotFound, Conflict):
        with state.sessions() as session:
            idempotent.replay(session)  # another request with the same key was faster, just now
        raise
    # Once the dataset is there; an object store may take a while for hundreds of parts.
    answer.background = BackgroundTask(parts.remove, state.store, whole)
    return answer


def _keep(
    request: Request,
    principal: Principal,
    idempotent: IdempotentRequest,
    name: str,
    converted: Convert,
    upload: Upload | None = None,
) -> Response:
    """Converts and registers a dataset. An upload in parts goes in the same transaction, and with it its share of the quota."""
    state = request.app.state
    with temporary_directory() as folder:
        content = converted(folder=folder)
        with state.sessions.begin() as session:
            require_live(session, principal)  # hours may have passed
            idempotent.begin(session)
            if upload is not None:
                uploading.remove(session, upload)
            dataset = service.register(session, state.store, principal, state.settings.limits, name, content)
            detail = {"rows": dataset.row_count, **({"skipped": dataset.skipped} if dataset.skipped else {})}
            audit.record(session, principal, "dataset.created", dataset.id, **detail)
            location = {"Location": f"{request.url.path}/{dataset.id}"}
            return idempotent.keep(session, DatasetOut.model_validate(dataset), status.HTTP_201_CREATED, location)


@router.get("", summary="List datasets, newest first", responses=responses(Unprocessable))
def list_datasets(
    principal: ReadDep, session: SessionDep, limit: Limit = 20, after: AfterDataset = None
) -> DatasetPage:
    datasets, has_more = repository.page(session, principal.tenant_id, after, limit)
    return DatasetPage.of(imports.describe(session, datasets), has_more)


@router.get("/{dataset_id}", summary="One dataset", responses=responses(NotFound, Unprocessable))
async def get_dataset(
    request: Request,
    response: Response,
    dataset_id: str,
    principal: ReadDep,
    session: SessionDep,
    wait: Annotated[
        int, Query(ge=0, le=60, description="Seconds to wait for the end of its import before its state is returned")
    ] = 0,
) -> DatasetOut:
    dataset = await run_in_threadpool(
        lambda: imports.describe(session, [service.find(session, principal.tenant_id, dataset_id)])[0]
    )
    if wait and dataset.status == "importing":
        await release_connection(session)
        dataset = await waiting.until_imported(request, principal, dataset_id, wait)
    if dataset.status == "importing":
        response.headers["Retry-After"] = "0" if wait else RETRY_AFTER_SECONDS
    return dataset


@router.get(
    "/{dataset_id}/skipped",
    summary="Download the report of the rows that were left out",
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {"application/x-ndjson": {"schema": _SKIPPED}},
            "description": "JSON lines, one for each such row",
        },
        **responses(NotFound, Conflict, Gone, Unavailable),
    },
)
def list_skipped(request: Request, dataset_id: str, principal: ReadDep, session: SessionDep) -> Response:
    """Of an upload with `on_bad_row=skip`: {"unit": "line" or "row", "number", "reason"}, in the order in which they were found,
    those with the id of an earlier row last. Empty if all rows were kept."""
    state = request.app.state
    return Download(
        state.shares,
        principal.tenant_id,
        service.skipped(session, state.store, principal.tenant_id, dataset_id),
        check=live_check(state.sessions, principal),
        media_type="application/x-ndjson",
        headers={"Content-Disposition": f'attachment; filename="{dataset_id}.skipped.jsonl"'},
    )


@router.delete(
    "/{dataset_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    summary="Delete a dataset",
    responses=responses(NotFound, Conflict),
)
def delete_dataset(
    request: Request, dataset_id: str, principal: SubmitDep, session: SessionDep, background: BackgroundTasks
) -> None:
    """Results of finished jobs are kept, and still name their samples by id; the rows themselves are removed. An import that has
    not ended is cancelled."""
    dataset = service.delete(session, principal.tenant_id, dataset_id)
    audit.record(session, principal, "dataset.deleted", dataset.id)
    if not dataset.is_ready:
        imports.cancel(session, dataset)
        return
    # Runs after the response, hence after the commit: rows are not removed for a deletion that was rolled back.
    state = request.app.state
    background.add_task(service.remove_unused_files, state.sessions, state.store, dataset.fingerprint, dataset.id)
