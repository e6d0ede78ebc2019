"""`/v1/selection-jobs/{job_id}/...`: what a succeeded job found, in pages, streams and files."""

from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.responses import StreamingResponse

from service.audit import service as audit
from service.auth.authentication import ReadDep, live_check
from service.db.engine import SessionDep
from service.http import etags
from service.http.downloads import Download
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
from service.results import explain, pages, repository
from service.results.chart_schemas import ResultCharts
from service.results.export import Rows
from service.results.formats import ENCODERS, MEDIA_TYPES, Format, comma_separated
from service.results.presets import Preset
from service.results.presets.stream import stream
from service.results.schemas import (
    ProvenanceOut,
    SampleOut,
    SelectionResult,
)
from service.results.service import finished_job, require_content
from winnow.merkle import JOB_METADATA, ROOT_METADATA

_WEIGHTS_ARE_LEFT = "omit preset and include (in Python include=None, in the CLI --no-messages) to export the weights"

router = APIRouter(
    prefix="/selection-jobs",
    tags=["results"],
    responses=responses(Unauthorized, Forbidden, NotFound, Conflict, Unprocessable),
)
router.include_router(pages.router)

DEFAULT_LIMIT = 1000
PageLimit = Annotated[int, Query(ge=1, le=10_000, description="Maximum number of samples per page")]


@router.get(
    "/{job_id}/results",
    summary="Get the summary of a succeeded job",
    response_model=SelectionResult,
    responses=etags.NOT_MODIFIED,
)
def get_results(job_id: str, request: Request, session: SessionDep, principal: ReadDep) -> Response:
    job = finished_job(session, principal.tenant_id, job_id)
    result = repository.result(session, job.id)
    found = SelectionResult(
        job_id=job.id,
        name=job.name,
        labels=job.labels,
        created_at=result.created_at,
        sample_count=result.sample_count,
        **result.summary,
    )
    return etags.answer_by_content(request, found)


@router.get(
    "/{job_id}/results/charts",
    summary="Get what pictures of the result are drawn from",
    response_model=ResultCharts,
    responses=etags.NOT_MODIFIED,
)
def get_charts(job_id: str, request: Request, session: SessionDep, principal: ReadDep) -> Response:
    """Made when the result was published, and small whatever the size of the pool. Of a job of a version that made none, the
    answer is 404 with the code `no_charts`."""
    job = finished_job(session, principal.tenant_id, job_id)
    row = repository.charts(session, job.id)
    if row is None:
        raise NotFound(
            f"Job {job_id} was computed by a version of Winnow that made no charts. Post the same job again: it reuses what still"
            " exists, and its result has them.",
            code="no_charts",
        )
    tag = etags.make("charts", repository.weights_root(session, job.id), job.id)
    return etags.answer(
        request,
        tag,
        lambda: ResultCharts.model_validate({**row.charts, "job_id": job.id, "created_at": row.created_at}),
    )


def _asked(
    landmarks: Annotated[
        int,
        Query(ge=0, le=100, description="Number of the nearest exact samples to list, among which weights are shared"),
    ] = 5,
    target: Annotated[
        int | None, Query(ge=0, description="Explain the influence on this target sample only, by its index")
    ] = None,
    targets_after: AfterNumber = None,
    targets_limit: Annotated[
        int, Query(ge=1, le=10_000, description="Maximum number of target samples per page")
    ] = DEFAULT_LIMIT,
) -> partial[explain.SampleQuery]:
    first = 0 if targets_after is None else targets_after + 1
    return partial(
        explain.SampleQuery, landmarks=landmarks, target=target, first_target=first, targets_limit=targets_limit
    )


Asked = Annotated[partial[explain.SampleQuery], Depends(_asked)]


@router.get(
    "/{job_id}/samples",
    summary="Explain the influence of the sample with an id",
    response_model=SampleOut,
    responses=etags.NOT_MODIFIED,
)
def get_sample_by_id(
    job_id: str,
    request: Request,
    session: SessionDep,
    principal: ReadDep,
    id: Annotated[str, Query(description="The sample's own id in the pool", examples=["word_problem-0017"])],
    asked: Asked,
) -> Response:
    """Like the sample at an index, found by its id; in a large pool that takes longer."""
    job = finished_job(session, principal.tenant_id, job_id)
    session.commit()  # no transaction is open while the store is read
    query = asked(index=explain.index_of(request.app.state.store, job, id))
    return etags.answer_by_content(request, explain.sample(session, request.app.state.store, job, query))


@router.get(
    "/{job_id}/samples/{index}",
    summary="Explain the influence of one sample",
    response_model=SampleOut,
    responses=etags.NOT_MODIFIED,
)
def get_sample(
    job_id: str, index: int, request: Request, session: SessionDep, principal: ReadDep, asked: Asked
) -> Response:
    """If no explanation can be given any more, `explanation` is null, and `explanation_missing` says why and what to do."""
    job = finished_job(session, principal.tenant_id, job_id)
    return etags.answer_by_content(request, explain.sample(session, request.app.state.store, job, asked(index=index)))


@router.get(
    "/{job_id}/export",
    summary="Export all samples or the selection as a file",
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
    principal: ReadDep,
    format: Annotated[Format, Query(description="Of the file")] = Format.PARQUET,
    selected_only: Annotated[
        bool, Query(description="true: only the selection, by rank; false: all samples, by index")
    ] = False,
    include: Annotated[
        Literal["messages"] | None,
        Query(
            description="Include the samples' content. Uploaded again, the file gives the same samples, in CSV with"
            " escape_formulas=false. JSON in a string are messages and tools in CSV, tools and the arguments of calls in Parquet."
        ),
    ] = None,
    escape_formulas: Annotated[
        bool,
        Query(
            description="CSV only: put an apostrophe before each id, source or text that a spreadsheet would take for a formula,"
            " that is one that starts with = + - @, a tab or a line break and is no number. false: as they were uploaded."
        ),
    ] = True,
    preset: Annotated[
        Preset | None,
        Query(
            description="The selection in the pool's order, as the JSON lines that a training tool reads; then omit the other"
            " parameters. A sample that the tool's format cannot hold is answered with 422 `preset_unsuitable`."
        ),
    ] = None,
    repeat: Annotated[
        bool,
        Query(description="With preset: each line as often as the sample's weight, rounded so that the total stays"),
    ] = False,
) -> Response:
    """Columns: index, id, source, influence, weight, exact, selected, rank, and with `include` those of messages, tools and text
    that the pool has. The influence of a sample that took no part is null, in CSV an empty field."""
    job = finished_job(session, principal.tenant_id, job_id)
    if preset is not None:
        format = _format_of_preset(request, format)
        require_content(job, "preset", _WEIGHTS_ARE_LEFT)
    elif repeat:
        raise Unprocessable("repeat applies to presets; omit it, or pass preset, such as preset=rows.", param="repeat")
    if include is not None:
        require_content(job, "include", _WEIGHTS_ARE_LEFT)
    if format is not Format.CSV and "escape_formulas" in request.query_params:
        raise Unprocessable("escape_formulas applies to format=csv; omit it.", param="escape_formulas")
    root = repository.weights_root(session, job.id)
    tag = etags.make("export", root, job.id, format.value, selected_only, include, escape_formulas, preset, repeat)
    if (unchanged := etags.not_modified(request, tag)) is not None:
        return unchanged
    options = {"selected_only": selected_only, "include": include} if preset is None else {"preset": preset}
    audit.record(session, principal, "results.exported", job.id, format=format, **options)
    rows = Rows(request.app.state.sessions, request.app.state.store, job)
    if preset is not None:
        encoded = stream(rows.selected_in_pool_order, preset, repeated=repeat)
    else:
        encode = ENCODERS[format] if escape_formulas else partial(comma_separated, escape_formulas=False)
        origin = {JOB_METADATA: job.id, ROOT_METADATA: root}  # which a Parquet file keeps
        batches = rows.batches(format, selected_only, include)
        encoded = encode(batch.replace_schema_metadata(origin) for batch in batches)
    return Download(
        request.app.state.shares,
        principal.tenant_id,
        encoded,
        check=live_check(request.app.state.sessions, principal),
        media_type=MEDIA_TYPES[format],
        headers={"Content-Disposition": f'attachment; filename="{job.id}.{format}"', **etags.headers(tag)},
    )


def _format_of_preset(request: Request, format: Format) -> Format:
    """JSON lines.

    Raises:
        Unprocessable: something else is asked for, or how to write another format.
    """
    for name in ("selected_only", "include", "escape_formulas"):
        if name in request.query_params:
            raise Unprocessable(f"A preset is the selection with its content, as JSON lines; omit {name}.", param=name)
    if "format" in request.query_params and format is not Format.JSONL:
        raise Unprocessable("A preset is written as JSON lines; omit format.", param="format")
    return Format.JSONL


@router.get(
    "/{job_id}/provenance",
    summary="Get the audit record",
    response_model=ProvenanceOut,
    responses=etags.NOT_MODIFIED,
)
def get_provenance(
    job_id: str,
    request: Request,
    session: SessionDep,
    principal: ReadDep,
    chunks: Annotated[bool, Query(description="Include `chunk_sha256`, to find out where a file differs")] = False,
) -> Response:
    """Stays when the job is deleted."""
    job = finished_job(session, principal.tenant_id, job_id, or_deleted=True)
    row = repository.provenance(session, job.id)
    audit.record(session, principal, "provenance.read", job.id)
    found = ProvenanceOut(
        job_id=job.id,
        created_at=row.created_at,
        weights_root=row.weights_root.hex(),
        chunk_sha256=(repository.chunk_hashes(session, job.id) or None) if chunks else None,
        record=row.record,
    )
    return etags.answer_by_content(request, found)
