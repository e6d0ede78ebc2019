"""`/jobs/{id}/samples`: the samples of a result, one of them read, explained, and as the model reads it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from sqlalchemy.orm import Session

from service.auth.authentication import ReadDep
from service.auth.principal import Principal
from service.datasets import service as datasets
from service.datasets import storage
from service.db.engine import SessionDep
from service.http.errors import ApiError, NotFound
from service.http.pagination import AfterNumber
from service.plan.parameters import Parameters
from service.previews import service as previews
from service.results import explain, repository
from service.results.formats import or_null
from service.results.schemas import SampleOut
from service.results.service import FinishedJob
from service.storage.artifacts import ArtifactStore
from service.storage.checksums import ArtifactDamaged
from service.tasks import TaskState
from service.web.admission import logged_in
from service.web.conversation import pieces, turns
from service.web.job_heading import Heading, finished
from service.web.rendering import HEADERS, render
from winnow import marked_text

router = APIRouter(include_in_schema=False, dependencies=[Depends(logged_in)])

_SHOWN = 12_000
"""Characters of a sample's text on a page; all of it is an address of its own."""
_LISTED, _BEGINNING = 20, 300
_LANDMARKS, _TARGETS = 5, 10
_READ = ("reasoning", "template_arguments", "max_length")
Index = Annotated[int, Query(ge=0)]
Show = Literal["selected", "all"]


def _explained(request: Request, session: Session, heading: Heading, index: int) -> SampleOut:
    query = explain.SampleQuery(index=index, landmarks=_LANDMARKS, target=None, first_target=0, targets_limit=_TARGETS)
    return explain.sample(session, request.app.state.store, heading.finished, query)


@router.get("/jobs/{job_id}/samples")
def samples_page(
    request: Request,
    job_id: str,
    session: SessionDep,
    principal: ReadDep,
    show: Show = "selected",
    after: AfterNumber = None,
    index: Index | None = None,
) -> Response:
    """A page of samples, in the selection's order or the pool's; and the one of `index`, to be read."""
    heading = finished(session, principal.tenant_id, job_id)
    store = request.app.state.store
    listed, has_more = (_selected if show == "selected" else _all)(session, store, heading.finished, after)
    one: dict[str, Any] = {"sample": None}
    if index is not None:
        one = _one(_explained(request, session, heading, index))
    return render(
        request, "samples.html", **heading.values(), listed=listed, has_more=has_more, show=show, after=after, **one
    )


@dataclass(frozen=True, slots=True)
class Listed:
    """A sample of the list; `number` is its place in it, `text` how it begins (None: the pool's rows are not there)."""

    number: int
    index: int
    id: str
    source: str | None
    influence: float | None
    exact: bool
    rank: int | None
    text: str | None


def _selected(session: Session, store: ArtifactStore, job: FinishedJob, after: int | None) -> tuple[list[Listed], bool]:
    rows, has_more = repository.selected_after(session, job.id, -1 if after is None else after, _LISTED)
    session.commit()  # no transaction is open while the store is read
    begin = _beginnings(store, job, [row.sample_index for row in rows])
    listed = [
        Listed(row.rank, row.sample_index, row.sample_id, row.source, row.influence, row.exact, row.rank, text)
        for row, text in zip(rows, begin, strict=True)
    ]
    return listed, has_more


def _all(session: Session, store: ArtifactStore, job: FinishedJob, after: int | None) -> tuple[list[Listed], bool]:
    start, count = 0 if after is None else after + 1, job.pool.row_count
    stop = min(start + _LISTED, count)
    if start >= stop:
        return [], False
    found = repository.weights(session, job.id, start, stop)
    ranks = repository.ranks(session, job.id, start, stop)
    session.commit()  # no transaction is open while the store is read
    ids, sources = storage.read_ids(store, job.pool.fingerprint, start, stop)
    begin = _beginnings(store, job, range(start, stop))
    columns = (range(start, stop), ids, sources, or_null(found.influence), found.exact.tolist(), begin)
    listed = [
        Listed(index, index, id, source, influence, exact, ranks.get(index), text)
        for index, id, source, influence, exact, text in zip(*columns, strict=True)
    ]
    return listed, stop < count


def _beginnings(store: ArtifactStore, job: FinishedJob, indices: Sequence[int]) -> Sequence[str | None]:
    """How the samples begin: what is said first, or the text."""
    if job.pool.deleted_at is not None:
        return [None] * len(indices)
    try:
        samples = storage.read_samples(store, job.pool.fingerprint, indices)
    except (FileNotFoundError, ArtifactDamaged):
        return [None] * len(indices)
    return [" ".join(marked_text.plain(asdict(sample))[0][:_BEGINNING].split()) for sample in samples]


def _one(found: SampleOut) -> dict[str, Any]:
    """What the page says of the sample that is read."""
    said = turns(found.model_dump(include={"messages", "tools", "text"}), _SHOWN)
    return {
        "sample": found,
        "explanation": found.explanation,
        "turns": said,
        "hidden": sum(turn.hidden for turn in said),
    }


@router.get("/jobs/{job_id}/samples/{index}/text")
def sample_text(request: Request, job_id: str, index: int, session: SessionDep, principal: ReadDep) -> Response:
    """All of a sample, as plain text: its messages, each after its role."""
    heading = finished(session, principal.tenant_id, job_id)
    found = _explained(request, session, heading, index)
    if found.content_missing is not None:
        raise NotFound(found.content_missing)
    text, _ = marked_text.plain(found.model_dump())
    return Response(text, media_type="text/plain; charset=utf-8", headers=HEADERS)


@router.get("/jobs/{job_id}/samples/{index}/rendered")
def rendered_sample(request: Request, job_id: str, index: int, session: SessionDep, principal: ReadDep) -> Response:
    """A part of the page: the sample as the job's model reads it, which a worker renders. `X-Final` once it has."""
    heading = finished(session, principal.tenant_id, job_id)
    dataset = datasets.find_ready(session, principal.tenant_id, heading.job.pool_id)
    if not 0 <= index < dataset.row_count:
        raise NotFound(f"The pool has samples with index 0 to {dataset.row_count - 1}.", param="index")
    values: dict[str, Any] = {"sample": None, "waits": None, "failed": None}
    try:
        values |= _rendered(request, session, principal, heading, dataset, index)
    except ApiError as error:
        session.rollback()
        values["failed"] = error.detail
    answer = render(request, "rendered.html", index=index, job=heading.job, **values)
    answer.headers["X-Final"] = "true" if values["waits"] is None else "false"
    return answer


def _rendered(
    request: Request, session: Session, principal: Principal, heading: Heading, dataset: Any, index: int
) -> dict[str, Any]:
    state, job = request.app.state, heading.job
    asked = {name: job.parameters[name] for name in _READ if name in job.parameters}
    parameters = Parameters(method="random", **asked)
    name = job.model.get("name") or job.model.get("id") or ""
    wanted = previews.wanted_by(state.settings.models, dataset, index, 1, job.model, parameters, name)
    task = previews.find_or_start(session, principal, wanted)
    if task.state == TaskState.FAILED:
        raise previews.failure(task)
    if task.state != TaskState.SUCCEEDED:
        return {"waits": previews.pending(session, task, state.settings.ledger.lease_seconds).detail}
    result = task.result or {}
    session.commit()  # no transaction is open while the store is read
    row = previews.page(state.store, wanted, result).data[0].rendered
    assert row is not None
    shown, hidden = pieces(row.text or "", row.spans, row.kept, _SHOWN)
    return {"sample": row, "shown": shown, "hidden": hidden}
