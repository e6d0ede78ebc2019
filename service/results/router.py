"""`/v1/selection-jobs/{job_id}/...`: what a succeeded job found, in pages, streams and files."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy.orm import Session
from starlette.responses import StreamingResponse

from service import etags
from service.artifacts import ArtifactStore
from service.audit import service as audit
from service.database import SessionDep
from service.datasets import storage
from service.errors import Conflict, Forbidden, Gone, NotFound, Unauthorized, Unavailable, Unprocessable, responses
from service.pages import AfterNumber
from service.results import explain, repository
from service.results.export import ResultStream, Rows
from service.results.formats import ENCODERS, JOB_METADATA, MEDIA_TYPES, ROOT_METADATA, Format, jsonl
from service.results.schemas import (
    ProvenanceOut,
    SampleOut,
    SelectedOut,
    SelectedPage,
    SelectionResult,
    WeightOut,
    WeightsPage,
)
from service.results.service import finished_job
from service.tenants.service import ReadDep

router = APIRouter(
    prefix="/selection-jobs",
    tags=["results"],
    responses=responses(Unauthorized, Forbidden, NotFound, Conflict, Unprocessable),
)

DEFAULT_LIMIT = 1000
PageLimit = Annotated[int, Query(ge=1, le=10_000, description="Most samples of one page")]


@router.get(
    "/{job_id}/results",
    summary="The summary of a succeeded job",
    response_model=SelectionResult,
    responses=etags.NOT_MODIFIED,
)
def get_results(job_id: str, request: Request, session: SessionDep, caller: ReadDep) -> Response:
    job = finished_job(session, caller.tenant_id, job_id)
    result = repository.result(session, job.id)
    found = SelectionResult(
        job_id=job.id, created_at=result.created_at, sample_count=result.sample_count, **result.summary
    )
    return etags.answer_by_content(request, found)


@router.get(
    "/{job_id}/weights",
    summary="One weight a sample, in pool order",
    response_model=WeightsPage,
    responses={
        200: {"content": {MEDIA_TYPES[Format.JSONL]: {}}, "description": "A page, or with `stream` all as lines"},
        **etags.NOT_MODIFIED,
        **responses(Gone, Unavailable),
    },
)
def get_weights(
    job_id: str,
    request: Request,
    session: SessionDep,
    caller: ReadDep,
    after: AfterNumber = None,
    limit: PageLimit = DEFAULT_LIMIT,
    stream: Annotated[
        bool, Query(description="All that follow `after`, one JSON object a line; continues one that broke off")
    ] = False,
) -> Response:
    job = finished_job(session, caller.tenant_id, job_id)
    start = 0 if after is None else after + 1
    if not stream:
        tag = etags.make("weights", repository.weights_root(session, job.id), job.id, start, limit)
        return etags.answer(request, tag, lambda: _weights_page(session, request.app.state.store, job, start, limit))
    if "limit" in request.query_params:
        raise Unprocessable("limit goes with pages; leave it out, or leave out stream.", param="limit")
    tag = etags.make("weights", repository.weights_root(session, job.id), job.id, start, "stream")
    rows = Rows(request.app.state.sessions, request.app.state.store, job)
    return etags.not_modified(request, tag) or ResultStream(
        jsonl(rows.weights(start)), media_type=MEDIA_TYPES[Format.JSONL], headers=etags.headers(tag)
    )


def _weights_page(session: Session, store: ArtifactStore, job: repository.Job, start: int, limit: int) -> WeightsPage:
    stop = min(start + limit, job.pool.row_count)
    if start >= stop:
        return WeightsPage(data=[], has_more=False, last_id=None)
    ids, sources = storage.read_ids(store, job.pool.fingerprint, start, stop)
    found = repository.weights(session, job.id, start, stop)
    columns = (range(start, stop), ids, sources, found.influence, found.weight, found.exact)
    data = [
        WeightOut(index=index, id=id, source=source, influence=influence, weight=weight, exact=exact)
        for index, id, source, influence, weight, exact in zip(*columns, strict=True)
    ]
    return WeightsPage(data=data, has_more=stop < job.pool.row_count, last_id=stop - 1)


@router.get(
    "/{job_id}/selected",
    summary="The selected samples, in rank order",
    response_model=SelectedPage,
    responses=etags.NOT_MODIFIED,
)
def get_selected(
    job_id: str,
    request: Request,
    session: SessionDep,
    caller: ReadDep,
    after: AfterNumber = None,
    limit: PageLimit = DEFAULT_LIMIT,
) -> Response:
    job = finished_job(session, caller.tenant_id, job_id)
    last = -1 if after is None else after
    tag = etags.make("selected", repository.weights_root(session, job.id), job.id, last, limit)
    return etags.answer(request, tag, lambda: _selected_page(session, job, last, limit))


def _selected_page(session: Session, job: repository.Job, after: int, limit: int) -> SelectedPage:
    found = repository.selected_after(session, job.id, after, limit + 1)
    data = [
        SelectedOut(
            rank=row.rank,
            index=row.sample_index,
            id=row.sample_id,
            source=row.source,
            influence=row.influence,
            weight=row.weight,
            exact=row.exact,
        )
        for row in found[:limit]
    ]
    return SelectedPage(data=data, has_more=len(found) > limit, last_id=data[-1].rank if data else None)


@router.get(
    "/{job_id}/samples/{index}",
    summary="One sample, and why it has its influence",
    response_model=SampleOut,
    responses=etags.NOT_MODIFIED,
)
def get_sample(
    job_id: str,
    index: int,
    request: Request,
    session: SessionDep,
    caller: ReadDep,
    landmarks: Annotated[int, Query(ge=0, le=100, description="How many of those that spoke for it are named")] = 10,
    target: Annotated[
        int | None, Query(ge=0, description="Explains the influence on this target sample alone, by its index")
    ] = None,
    targets_after: AfterNumber = None,
    targets_limit: Annotated[
        int, Query(ge=1, le=10_000, description="Most target samples of one page")
    ] = DEFAULT_LIMIT,
) -> Response:
    """Where the explanation can no longer be made, `explanation` is null, and `explanation_missing` says why and what to do."""
    job = finished_job(session, caller.tenant_id, job_id)
    first = 0 if targets_after is None else targets_after + 1
    asked = explain.Asked(
        index=index, landmarks=landmarks, target=target, first_target=first, targets_limit=targets_limit
    )
    return etags.answer_by_content(request, explain.sample(session, request.app.state.store, job, asked))


@router.get(
    "/{job_id}/export",
    summary="All samples or the selection, as a file",
    response_class=StreamingResponse,
    responses={
        200: {"content": {media_type: {} for media_type in MEDIA_TYPES.values()}, "description": "The file, streamed"},
        **etags.NOT_MODIFIED,
        **responses(Gone, Unavailable),
    },
)
def export(
    job_id: str,
    request: Request,
    session: SessionDep,
    caller: ReadDep,
    format: Annotated[Format, Query(description="Of the file")] = Format.PARQUET,
    selected_only: Annotated[
        bool, Query(description="Only the selection, by rank; else all samples, by index")
    ] = False,
    include: Annotated[
        Literal["messages"] | None, Query(description="The samples' content too: ready to train on; not in CSV")
    ] = None,
) -> Response:
    """Columns: index, id, source, influence, weight, exact, selected, rank, and with `include` messages (or text)."""
    job = finished_job(session, caller.tenant_id, job_id)
    if include is not None:
        _require_content(job, format)
    root = repository.weights_root(session, job.id)
    tag = etags.make("export", root, job.id, format.value, selected_only, include)
    if (unchanged := etags.not_modified(request, tag)) is not None:
        return unchanged
    audit.record(
        session, caller, "results.exported", job.id, format=format, selected_only=selected_only, include=include
    )
    rows = Rows(request.app.state.sessions, request.app.state.store, job)
    origin = {JOB_METADATA: job.id, ROOT_METADATA: root}  # which a Parquet file keeps
    if include is None:
        batches = rows.selected() if selected_only else rows.all()
    else:
        batches = rows.selected_with_content() if selected_only else rows.all_with_content()
    return ResultStream(
        ENCODERS[format](batch.replace_schema_metadata(origin) for batch in batches),
        media_type=MEDIA_TYPES[format],
        headers={"Content-Disposition": f'attachment; filename="{job.id}.{format}"', **etags.headers(tag)},
    )


def _require_content(job: repository.Job, format: Format) -> None:
    if format is Format.CSV:
        raise Unprocessable("include=messages needs format=jsonl or format=parquet; CSV has no lists.", param="include")
    if job.pool.deleted:
        raise Gone(
            f"The pool {job.pool.id} has been deleted, and its text with it; export without include.",
            param="include",
            code="pool_deleted",
        )


@router.get(
    "/{job_id}/provenance",
    summary="The audit record",
    response_model=ProvenanceOut,
    responses=etags.NOT_MODIFIED,
)
def get_provenance(
    job_id: str,
    request: Request,
    session: SessionDep,
    caller: ReadDep,
    chunks: Annotated[bool, Query(description="With `chunk_sha256`, to find out where a file differs")] = False,
) -> Response:
    """Stays when the job is deleted."""
    job = finished_job(session, caller.tenant_id, job_id, or_deleted=True)
    row = repository.provenance(session, job.id)
    audit.record(session, caller, "provenance.read", job.id)
    found = ProvenanceOut(
        job_id=job.id,
        created_at=row.created_at,
        weights_root=row.weights_root.hex(),
        chunk_sha256=(repository.chunk_hashes(session, job.id) or None) if chunks else None,
        record=row.record,
    )
    return etags.answer_by_content(request, found)
