"""`/v1/selection-jobs/{job_id}/weights` and `/selected`: the samples of a result, in pages or as a stream."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from service.auth.authentication import ReadDep, live_check
from service.db.engine import SessionDep
from service.http import etags
from service.http.downloads import Download
from service.http.errors import Gone, Unavailable, Unprocessable, responses
from service.http.pagination import AfterNumber
from service.results import browsing, repository
from service.results.browsing import Sort, Wanted
from service.results.export import Rows
from service.results.formats import MEDIA_TYPES, Format, jsonl
from service.results.schemas import SelectedOut, SelectedPage, WeightOut, WeightsPage
from service.results.service import finished_job

router = APIRouter()

_MOST_WITH_TEXT = 1000
_TEXT = 2000  # characters


class _Pages(BaseModel):
    """What both lists take."""

    sort: str
    order: Literal["asc", "desc"] | None = Field(
        default=None,
        description="By default `desc` for influence and weight, `asc` for the others. Of equal ones the first in the list's own"
        " order comes first; those without influence come last",
    )
    source: str | None = Field(default=None, description="Only samples of this source")
    exact: bool | None = Field(
        default=None, description="true: only those whose influence was computed; false: only the others"
    )
    text: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="Only samples that say this, in letters of either case, in the content or the reasoning of a message or in"
        " their text. A call looks through a part of a large pool: a page may be short, even empty, while `has_more` is true and"
        " `last_id` says where to go on.",
    )
    include: Literal["text"] | None = Field(
        default=None,
        description=f"Add `text`, the first {_TEXT} characters of what each says; at most {_MOST_WITH_TEXT} samples per page",
    )
    after: AfterNumber = None
    limit: int = Field(default=1000, ge=1, le=10_000, description="Maximum number of samples per page")

    def wanted(self, selected: bool | None = None) -> Wanted:
        sort = Sort(self.sort)
        return Wanted(
            sort=sort,
            descending=self.order == "desc" if self.order else sort in (Sort.INFLUENCE, Sort.WEIGHT),
            source=self.source,
            exact=self.exact,
            selected=selected,
            says=self.text,
            after=self.after,
            limit=min(self.limit, _MOST_WITH_TEXT) if self.include else self.limit,
            text=_TEXT if self.include else 0,
        )


class _WeightsQuery(_Pages):
    sort: Literal["index", "influence", "weight"] = Field(default="index", description="`index`: the order of the pool")
    selected: bool | None = Field(default=None, description="true: only selected samples; false: only the others")
    stream: bool = Field(
        default=False,
        description="All weights following `after`, one JSON object per line; resumes an interrupted stream",
    )


class _SelectedQuery(_Pages):
    sort: Literal["rank", "index", "influence", "weight"] = Field(
        default="rank", description="`rank`: the order in which they were selected; `index`: that of the pool"
    )


@router.get(
    "/{job_id}/weights",
    summary="List or stream one weight per sample, in pool order or another",
    response_model=WeightsPage,
    responses={
        200: {
            "content": {MEDIA_TYPES[Format.JSONL]: {}},
            "description": "A page, or with `stream` all weights as JSON lines",
        },
        **etags.NOT_MODIFIED,
        **responses(Gone, Unavailable),
    },
)
def get_weights(
    job_id: str, request: Request, session: SessionDep, principal: ReadDep, query: Annotated[_WeightsQuery, Query()]
) -> Response:
    job = finished_job(session, principal.tenant_id, job_id)
    root, state = repository.weights_root(session, job.id), request.app.state
    if not query.stream:
        wanted = query.wanted(selected=query.selected)
        tag = etags.make("weights", root, job.id, wanted)
        return etags.answer(request, tag, lambda: _page_of(browsing.of_pool(session, state.store, job, wanted)))
    if unknown := query.model_fields_set - {"stream", "after"}:
        param = min(unknown)
        raise Unprocessable(f"{param} applies to pages; omit either {param} or stream.", param=param)
    start = 0 if query.after is None else query.after + 1
    tag = etags.make("weights", root, job.id, start, "stream")
    rows = Rows(state.sessions, state.store, job)
    return etags.not_modified(request, tag) or Download(
        state.shares,
        principal.tenant_id,
        jsonl(rows.weights(start)),
        check=live_check(state.sessions, principal),
        media_type=MEDIA_TYPES[Format.JSONL],
        headers=etags.headers(tag),
    )


def _page_of(found: browsing.Found) -> WeightsPage:
    data = [WeightOut.model_validate(row, from_attributes=True) for row in found.rows]
    return WeightsPage(data=data, has_more=found.has_more, last_id=found.last)


@router.get(
    "/{job_id}/selected",
    summary="List the selected samples, in rank order or another",
    response_model=SelectedPage,
    responses={**etags.NOT_MODIFIED, **responses(Gone)},
)
def get_selected(
    job_id: str, request: Request, session: SessionDep, principal: ReadDep, query: Annotated[_SelectedQuery, Query()]
) -> Response:
    job, wanted, store = finished_job(session, principal.tenant_id, job_id), query.wanted(), request.app.state.store
    tag = etags.make("selected", repository.weights_root(session, job.id), job.id, wanted)

    def page() -> SelectedPage:
        found = browsing.of_selection(session, store, job, wanted)
        data = [SelectedOut.model_validate(row, from_attributes=True) for row in found.rows]
        return SelectedPage(data=data, has_more=found.has_more, last_id=found.last)

    return etags.answer(request, tag, page)
