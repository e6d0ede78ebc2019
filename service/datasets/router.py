"""Datasets over HTTP."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, BackgroundTasks, Request, Response, status
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session
from starlette.responses import StreamingResponse

from service.audit import service as audit
from service.auth.authentication import ReadDep, SubmitDep, live_check, require_live
from service.auth.principal import Principal
from service.auth.quotas import QuotaExceeded
from service.datasets import repository, service
from service.datasets.bad_rows import OnBadRow
from service.datasets.convert import convert
from service.datasets.rows.forms import Form
from service.datasets.rows.options import RowOptions
from service.datasets.schemas import (
    ColumnsQuery,
    DatasetName,
    DatasetOut,
    DatasetPage,
    DatasetRow,
    FormQuery,
    OnBadRowQuery,
    RowLimit,
    RowPage,
    SkippedRow,
    TemplateQuery,
)
from service.datasets.storage import Content
from service.datasets.upload import received
from service.db.engine import SessionDep, release_connection
from service.http.bodies import BodyBudget, set_budget
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
    responses,
)
from service.http.pagination import AfterDataset, AfterNumber, Limit
from service.idempotency.service import IdempotentRequest, KeyHeader, is_answered, request_digest
from service.settings import ApiSettings, LimitSettings
from service.shares import Shares
from service.storage.tempdirs import temporary_directory

router = APIRouter(prefix="/datasets", tags=["datasets"], responses=responses(Unauthorized, Forbidden))

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
            "application/json": {"schema": {"type": "array", "items": {"type": "object"}}},
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
    summary="Upload a dataset",
    response_model=DatasetOut,
    responses=responses(BadRequest, Conflict, TooLarge, Unprocessable, Unavailable),
    openapi_extra=_UPLOAD_BODY,
)
async def upload(
    request: Request,
    principal: SubmitDep,
    session: SessionDep,
    name: DatasetName,
    form: FormQuery = Form.AUTO,
    columns: ColumnsQuery = None,
    template: TemplateQuery = None,
    on_bad_row: OnBadRowQuery = OnBadRow.REFUSE,
    idempotency_key: KeyHeader = None,
) -> Response:
    """Stores the rows of the file, in order, as a dataset: all of them or none, or with `on_bad_row=skip` those that can be used.

    A row has `messages` (`[{"role", "content"}]`, with at least one reply of the assistant), or `conversations`, `prompt` and
    `completion`, `instruction` and `output`, `question` and `answer`, `inputs` and `targets`, or `text`, or what `columns` names
    or `template` makes; optionally an `id`, unique in the dataset, and a `source` (else `dataset`), by which results are grouped.
    A null counts as absent; other fields are left alone. If rows are invalid, the error `invalid_rows` names the first 20 by line
    (in JSON documents, Parquet and Arrow by row), from 1.

    The answer says what was taken: of which columns, in how many rows (`detected`), and how many rows were `skipped`.
    """
    options = RowOptions.parse(form, columns, template)
    state = request.app.state
    settings: ApiSettings = state.settings
    await run_in_threadpool(_check_room, session, principal, settings.limits, idempotency_key)
    # An upload may last for hours, and its conversion for minutes: no connection and no transaction is kept meanwhile.
    await release_connection(session)
    uploads, slowest = settings.uploads, settings.requests.bytes_per_second
    set_budget(request, BodyBudget(None, uploads.idle_seconds, slowest))
    shares: Shares = state.shares
    with shares.uploads.taken(principal.tenant_id):
        async with received(request, uploads) as (file, file_name), shares.readers.waited_for(principal.tenant_id):
            told_by = file_name if "." in file_name else name
            converted = partial(convert, file, options, uploads, name=told_by, on_bad_row=on_bad_row)
            keep = partial(_keep, request, file, principal, idempotency_key, name, converted)
            # Apart from the threads that answer other requests, which a few long conversions would otherwise use up.
            return await run_sync(keep, limiter=CapacityLimiter(1))


def _check_room(session: Session, principal: Principal, limits: LimitSettings, idempotency_key: str | None) -> None:
    """Before a byte is read; but who may store nothing more is still told again what was answered before."""
    try:
        service.check_quota(session, principal, limits, 1)
    except QuotaExceeded:
        if idempotency_key is None or not is_answered(session, principal, idempotency_key):
            raise


def _keep(
    request: Request,
    file: IO[bytes],
    principal: Principal,
    idempotency_key: str | None,
    name: str,
    converted: Callable[[Path], Content],
) -> Response:
    state = request.app.state
    digest = b""
    if idempotency_key is not None:
        file.seek(0)
        content_sha256 = hashlib.file_digest(file, "sha256").digest()  # type: ignore[arg-type]  # an IO[bytes] that can
        digest = request_digest(request, content_sha256)
    idempotent = IdempotentRequest(state.encryptor, principal, idempotency_key, digest)
    with state.sessions() as session:
        idempotent.replay(session)
    with temporary_directory() as folder:
        content = converted(folder)
        with state.sessions.begin() as session:
            require_live(session, principal)  # hours may have passed
            idempotent.begin(session)
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
    return DatasetPage.of([DatasetOut.model_validate(dataset) for dataset in datasets], has_more)


@router.get("/{dataset_id}", summary="One dataset", responses=responses(NotFound))
def get_dataset(dataset_id: str, principal: ReadDep, session: SessionDep) -> DatasetOut:
    return DatasetOut.model_validate(service.find(session, principal.tenant_id, dataset_id))


@router.get(
    "/{dataset_id}/rows",
    summary="List the rows of a dataset, in order",
    responses=responses(NotFound, Gone, Unprocessable),
)
def list_rows(
    request: Request,
    dataset_id: str,
    principal: ReadDep,
    session: SessionDep,
    limit: RowLimit = 20,
    after: AfterNumber = None,
) -> RowPage:
    start = 0 if after is None else after + 1
    samples, has_more = service.rows(session, request.app.state.store, principal.tenant_id, dataset_id, start, limit)
    data = [DatasetRow.model_validate(sample) for sample in samples]
    return RowPage.of(data, has_more, "index")


@router.get(
    "/{dataset_id}/skipped",
    summary="Download the report of the rows that were left out",
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {"application/x-ndjson": {"schema": _SKIPPED}},
            "description": "JSON lines, one for each such row",
        },
        **responses(NotFound, Gone, Unavailable),
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
    """Results of finished jobs are kept, and still name their samples by id; the rows themselves are removed."""
    dataset = service.delete(session, principal.tenant_id, dataset_id)
    audit.record(session, principal, "dataset.deleted", dataset.id)
    # Runs after the response, hence after the commit: rows are not removed for a deletion that was rolled back.
    state = request.app.state
    background.add_task(service.remove_unused_files, state.sessions, state.store, dataset.fingerprint, dataset.id)
