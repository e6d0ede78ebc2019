"""`/datasets`: adding data for a job, and its rows as they are or as a model sees them."""

import json
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from service.auth.authentication import ReadDep, SubmitDep
from service.datasets import imports, repository
from service.datasets import router as api
from service.datasets import service as datasets
from service.datasets.bad_rows import OnBadRow
from service.datasets.import_schemas import ImportRequest
from service.datasets.schemas import ColumnsQuery, DatasetName, DatasetOut, OnBadRowQuery
from service.db.engine import SessionDep
from service.http.pagination import AfterDataset
from service.idempotency.service import IdempotentRequest
from service.previews import router as previews
from service.previews.schemas import MaxLengthQuery, ModelQuery, PendingRows, ReasoningQuery, RowPage
from service.web import admission
from service.web.admission import FormDep, logged_in
from service.web.rendering import address, render, see_other

router = APIRouter(prefix="/datasets", include_in_schema=False, dependencies=[Depends(logged_in)])

_ENTRIES, _ROWS, _WAIT_SECONDS = 50, 10, 5
Role = Annotated[str, Query(pattern="^(pool|target)$")]


@router.get("")
def datasets_page(request: Request, session: SessionDep, principal: ReadDep, after: AfterDataset = None) -> Response:
    found, has_more = repository.page(session, principal.tenant_id, after, _ENTRIES)
    older = address("/datasets", after=found[-1].id) if has_more else None
    return render(request, "datasets.html", datasets=imports.describe(session, found), older=older)


@router.post("")
async def upload(
    request: Request,
    session: SessionDep,
    principal: SubmitDep,
    role: Role = "pool",
    form_token: str = "",
    name: DatasetName | None = None,
    columns: ColumnsQuery = None,
    on_bad_row: OnBadRowQuery = OnBadRow.REFUSE,
) -> Response:
    """A file, by a form or a script. What the form says stands in its address, since the file is not read before it is known."""
    admission.require_form_token(request, form_token or request.headers.get(admission.FORM_TOKEN_HEADER, ""))
    answer = await api.upload(
        request, principal, session, name=name or role, columns=columns or None, on_bad_row=on_bad_row
    )
    return _added(request, answer, role)


@router.post("/import")
def import_from_hub(request: Request, session: SessionDep, principal: SubmitDep, form: FormDep) -> Response:
    """A split of a dataset on the hub, which a worker imports."""
    given = {name: str(form.get(name, "")).strip() for name in ("id", "revision", "config", "split", "limit")}
    hub = {
        name: int(value) if name == "limit" and value.isdecimal() else value for name, value in given.items() if value
    }
    try:
        wanted = ImportRequest.model_validate({"hub": hub})
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    idempotent = IdempotentRequest(request.app.state.encryptor, principal, None, b"")
    answer = api.create_import(request, principal, session, idempotent, wanted)
    return _added(request, answer, str(form.get("role", "pool")))


def _added(request: Request, answer: Response, role: str) -> Response:
    """A script gets the dataset; a form leads to the new job, for which it is chosen."""
    if "text/html" not in request.headers.get("accept", ""):
        return answer
    return see_other(address("/jobs/new", **{role: json.loads(bytes(answer.body))["id"]}))


@router.get("/{dataset_id}")
async def rows_page(
    dataset_id: str,
    request: Request,
    session: SessionDep,
    principal: ReadDep,
    model: ModelQuery = None,
    reasoning: ReasoningQuery = None,
    max_length: MaxLengthQuery = None,
    start: Annotated[int, Query(ge=0, lt=2**62)] = 0,
    whole: bool = False,
) -> Response:
    """So many rows from one on, or `whole` this one, however long it is."""
    dataset: DatasetOut = await run_in_threadpool(
        lambda: imports.describe(session, [datasets.find(session, principal.tenant_id, dataset_id)])[0]
    )
    found, pending = None, None
    if dataset.status == "ready":
        answer = await previews.list_rows(
            request,
            dataset_id,
            principal,
            session,
            limit=1 if whole else _ROWS,
            after=start - 1 if start else None,
            model=model or None,
            reasoning=reasoning,
            max_length=max_length if model else None,
            wait=_WAIT_SECONDS if model else 0,
        )
        found, pending = _rows_of(answer)
    chosen = {"model": model, "max_length": str(max_length or ""), "reasoning": reasoning}

    def link(**more: str) -> str:
        return address(f"/datasets/{dataset_id}", **chosen, **more)

    values: dict[str, Any] = {"dataset": dataset, "page": found, "pending": pending, "link": link, "start": start}
    values |= {"model": model or "", "max_length": max_length, "whole": whole, "entries": _ROWS}
    return await run_in_threadpool(lambda: render(request, "rows.html", **values))


def _rows_of(answer: RowPage | Response) -> tuple[RowPage | None, PendingRows | None]:
    if isinstance(answer, RowPage):
        return answer, None
    body = bytes(answer.body)
    return (
        (None, PendingRows.model_validate_json(body))
        if answer.status_code == 202
        else (RowPage.model_validate_json(body), None)
    )
