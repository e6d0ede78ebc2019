"""Datasets over HTTP."""

import asyncio
import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import IO, Any

from fastapi import APIRouter, BackgroundTasks, Request, Response, status

from service.audit import service as audit
from service.database import SessionDep, give_back
from service.datasets import service
from service.datasets.convert import convert
from service.datasets.formats import Form
from service.datasets.schemas import DatasetObject, DatasetPage, DatasetRow, FormQuery, Name, RowLimit, RowPage
from service.datasets.upload import received
from service.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    Gone,
    NotFound,
    TooLarge,
    Unauthorized,
    Unprocessable,
    responses,
)
from service.idempotency.service import KeyHeader, Once, request_digest
from service.limits import quotas
from service.pages import AfterDataset, AfterNumber, Limit
from service.scratch import scratch, temporary_folder
from service.settings import ApiSettings
from service.tenants.caller import Caller
from service.tenants.service import ReadDep, SubmitDep

router = APIRouter(prefix="/datasets", tags=["datasets"], responses=responses(Unauthorized, Forbidden))

# Apart from the threads that answer other requests, which a few long uploads would otherwise use up.
_converters = ThreadPoolExecutor(max_workers=2, thread_name_prefix="dataset-converter")

_ROW = '{"id": "flan-17", "source": "flan", "prompt": "Name a prime.", "completion": "Seven."}\n'
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "JSONL, gzipped JSONL or Parquet, told apart by the content; the media type does not matter.",
        "content": {
            "application/jsonl": {"schema": {"type": "string"}, "example": _ROW},
            "application/gzip": _BINARY,
            "application/vnd.apache.parquet": _BINARY,
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
    response_model=DatasetObject,
    responses=responses(BadRequest, Conflict, TooLarge, Unprocessable),
    openapi_extra=_UPLOAD_BODY,
)
async def upload(
    request: Request,
    caller: SubmitDep,
    session: SessionDep,
    name: Name,
    form: FormQuery = Form.AUTO,
    idempotency_key: KeyHeader = None,
) -> Response:
    """Keeps the file's rows, in order, as a dataset; all of them or none.

    A row has `messages` (`[{"role", "content"}]`, the last from the assistant), or `prompt` and `completion`, or
    `instruction`, `output` and perhaps `input`, or `text`; and perhaps an `id`, unique in the dataset, and a `source`, by
    which results are counted. A null counts as absent; other fields are ignored. Where rows cannot be used, the error
    `invalid_rows` names the first 20 by line (in Parquet by row), from 1.
    """
    state = request.app.state
    settings: ApiSettings = state.settings
    if idempotency_key is None:  # else it may have been answered before
        await asyncio.to_thread(quotas.check_stored, session, caller, settings.limits, 1)
    # An upload may last for hours: the connection that told the caller goes back before it starts.
    await give_back(session)
    async with received(request, settings.uploads) as file:
        # What is logged and traced there is of this request.
        keep = partial(copy_context().run, _keep, request, file, caller, idempotency_key, name=name, form=form)
        return await asyncio.get_running_loop().run_in_executor(_converters, keep)


def _keep(
    request: Request, file: IO[bytes], caller: Caller, idempotency_key: str | None, *, name: str, form: Form
) -> Response:
    state = request.app.state
    with scratch(temporary_folder()) as folder, state.sessions.begin() as session:
        # The key is held while the file is converted, and with it a connection; converters are few. Without a key neither is.
        digest = b"" if idempotency_key is None else request_digest(request, _sha256(file))
        once = Once(session, state.sealer, caller, idempotency_key, digest)
        content = convert(file, form, state.settings.uploads, folder)
        limits = state.settings.limits
        dataset = service.register(session, state.store, caller=caller, limits=limits, name=name, content=content)
        audit.record(session, caller, "dataset.created", dataset.id, rows=dataset.row_count)
        location = {"Location": f"{request.url.path}/{dataset.id}"}
        return once.keep(DatasetObject.model_validate(dataset), status.HTTP_201_CREATED, location)


def _sha256(file: IO[bytes]) -> bytes:
    digest = hashlib.sha256()
    file.seek(0)
    while part := file.read(2**20):
        digest.update(part)
    return digest.digest()


@router.get("", summary="List datasets, newest first", responses=responses(Unprocessable))
def list_datasets(caller: ReadDep, session: SessionDep, limit: Limit = 20, after: AfterDataset = None) -> DatasetPage:
    datasets, has_more = service.page(session, caller.tenant_id, after, limit)
    data = [DatasetObject.model_validate(dataset) for dataset in datasets]
    return DatasetPage(data=data, has_more=has_more, last_id=data[-1].id if data else None)


@router.get("/{dataset_id}", summary="One dataset", responses=responses(NotFound))
def get_dataset(dataset_id: str, caller: ReadDep, session: SessionDep) -> DatasetObject:
    return DatasetObject.model_validate(service.find(session, caller.tenant_id, dataset_id))


@router.get(
    "/{dataset_id}/rows",
    summary="Rows of a dataset, in its order",
    responses=responses(NotFound, Gone, Unprocessable),
)
def list_rows(
    request: Request,
    dataset_id: str,
    caller: ReadDep,
    session: SessionDep,
    limit: RowLimit = 20,
    after: AfterNumber = None,
) -> RowPage:
    start = 0 if after is None else after + 1
    samples, has_more = service.rows(session, request.app.state.store, caller.tenant_id, dataset_id, start, limit)
    data = [DatasetRow.model_validate(sample) for sample in samples]
    return RowPage(data=data, has_more=has_more, last_id=data[-1].index if data else None)


@router.delete(
    "/{dataset_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    summary="Delete a dataset",
    responses=responses(NotFound, Conflict),
)
def delete_dataset(
    request: Request, dataset_id: str, caller: SubmitDep, session: SessionDep, background: BackgroundTasks
) -> None:
    """Results of finished jobs stay, and go on naming their samples by id; the rows themselves are removed."""
    dataset = service.delete(session, caller.tenant_id, dataset_id)
    audit.record(session, caller, "dataset.deleted", dataset.id)
    # Runs after the answer, hence after the commit: rows are not removed for a deletion that did not happen.
    state = request.app.state
    background.add_task(service.remove_unused_files, state.sessions, state.store, dataset.fingerprint)
