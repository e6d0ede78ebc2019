"""`/jobs/{id}/samples`: the samples of a result, one of them read, explained, and as the model reads it."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from sqlalchemy.orm import Session

from service.auth.authentication import ReadDep
from service.auth.principal import Principal
from service.datasets import service as datasets
from service.db.engine import SessionDep
from service.http.errors import ApiError, NotFound
from service.http.pagination import AfterNumber
from service.plan.parameters import Parameters
from service.previews import service as previews
from service.results import browsing, explain, repository
from service.results.browsing import Sort, Wanted
from service.results.schemas import SampleOut
from service.tasks import TaskState
from service.web.admission import logged_in
from service.web.conversation import pieces, turns
from service.web.job_heading import Heading, finished
from service.web.rendering import HEADERS, address, render
from winnow import marked_text

router = APIRouter(include_in_schema=False, dependencies=[Depends(logged_in)])

_SHOWN = 12_000
"""Characters of a sample's text on a page; all of it is an address of its own."""
_LISTED, _BEGINNING, _SOURCES = 20, 300, 100
_LANDMARKS, _TARGETS = 5, 10
_READ = ("reasoning", "template_arguments", "max_length")
Index = Annotated[int, Query(ge=0)]


def _explained(request: Request, session: Session, heading: Heading, index: int) -> SampleOut:
    query = explain.SampleQuery(index=index, landmarks=_LANDMARKS, target=None, first_target=0, targets_limit=_TARGETS)
    return explain.sample(session, request.app.state.store, heading.finished, query)


@dataclass(frozen=True, slots=True)
class Filters:
    """As a form sends them: what is empty is any."""

    show: Literal["selected", "all"] = "selected"
    text: Annotated[str, Query(max_length=200)] = ""
    source: Annotated[str, Query(max_length=1024)] = ""
    exact: Literal["", "true", "false"] = ""
    sort: Literal["", "influence", "influence.asc", "weight", "weight.asc"] = ""

    def wanted(self, after: int | None) -> Wanted:
        sort, _, order = self.sort.partition(".")
        return Wanted(
            sort=Sort(sort or ("rank" if self.show == "selected" else "index")),
            descending=bool(sort) and not order,
            source=self.source or None,
            exact=self.exact == "true" if self.exact else None,
            says=self.text or None,
            after=after,
            limit=_LISTED,
            text=_BEGINNING,
        )

    @property
    def are_set(self) -> bool:
        return bool(self.text or self.source or self.exact or self.sort)


@router.get("/jobs/{job_id}/samples")
def samples_page(
    request: Request,
    job_id: str,
    session: SessionDep,
    principal: ReadDep,
    filters: Annotated[Filters, Depends()],
    after: AfterNumber = None,
    index: Index | None = None,
) -> Response:
    """A page of samples, in the selection's order, the pool's or another; and the one of `index`, to be read."""
    heading = finished(session, principal.tenant_id, job_id)
    sources = repository.result(session, job_id).summary.get("sources") or {}
    find = browsing.of_selection if filters.show == "selected" else browsing.of_pool
    found = find(session, request.app.state.store, heading.finished, filters.wanted(after))
    query = asdict(filters)
    here = f"/jobs/{job_id}/samples"
    one: dict[str, Any] = {"sample": None}
    if index is not None:
        one = _one(_explained(request, session, heading, index))
    return render(
        request,
        "samples.html",
        **heading.values(),
        **one,
        found=found,
        filters=filters,
        sources=list(sources)[:_SOURCES],
        is_first=after is None,
        first=address(here, **query),
        following=address(here, **query, after=str(found.last)) if found.has_more else None,
        read=address(here, **query, after=None if after is None else str(after)),
        other=address(here, **query | {"show": "all" if filters.show == "selected" else "selected"}),
    )


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
