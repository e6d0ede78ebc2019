"""`/jobs/{id}/compare`: a result beside that of another job."""

from typing import Any

from fastapi import APIRouter, Depends, Query, Request, Response
from sqlalchemy.orm import Session

from service.auth.authentication import ReadDep
from service.db.engine import SessionDep
from service.jobs import repository as jobs
from service.ledger.state import JobStatus
from service.results import repository
from service.results.comparison import Comparison, compare
from service.web.admission import logged_in
from service.web.formats import number, percent
from service.web.job_heading import Heading, finished
from service.web.plots.bars import grouped
from service.web.plots.scatter import against
from service.web.plots.svg import Chart
from service.web.rendering import render

router = APIRouter(include_in_schema=False, dependencies=[Depends(logged_in)])

_OFFERED = 100
_SOURCES = 10


@router.get("/jobs/{job_id}/compare")
def compare_page(
    request: Request,
    job_id: str,
    session: SessionDep,
    principal: ReadDep,
    other: str = Query(default="", alias="with", max_length=100),
) -> Response:
    heading = finished(session, principal.tenant_id, job_id)
    offered, _ = jobs.page(session, principal.tenant_id, after=None, status=JobStatus.SUCCEEDED, limit=_OFFERED)
    values: dict[str, Any] = {"second": None}
    if other := other.strip():
        second = finished(session, principal.tenant_id, other)
        found = compare(session, heading.finished, second.finished)
        values = {
            "second": second,
            "found": found,
            "figures": _figures(found),
            "charts": _charts(session, heading, second, found),
        }
    session.commit()  # no transaction is open while the page is drawn
    offered = [job for job in offered if job.id != job_id]
    return render(request, "compare.html", **heading.values(), other=other, offered=offered, **values)


def _figures(found: Comparison) -> list[tuple[str, str, str | None]]:
    first, second = found.selected
    by_chance = None if found.expected is None else f"by chance {number(round(found.expected, 1))}"
    return [
        ("Selected", f"{number(first)} and {number(second)}", None),
        ("Selected by both", number(found.in_both), by_chance),
        ("Overlap", percent(found.jaccard), "of what either selected"),
        ("Rank correlation", number(found.rank_correlation, 2), "of influences; 1 is the same order"),
    ]


def _charts(session: Session, first: Heading, second: Heading, found: Comparison) -> list[Chart]:
    charts = [_sources(session, first, second)]
    a, b = (values.tolist() for values in found.influence)
    if len(a) > 1:
        titles = {"x_title": "influence in this job", "y_title": "influence in the other"}
        charts.append(against("influences", "Influence of the same samples", a, b, **titles, has_diagonal=False))
    return charts


def _sources(session: Session, first: Heading, second: Heading) -> Chart:
    """Shares of each selection, of the sources that are most frequent in both together."""
    counts: list[dict[str, int]] = []
    for heading in (first, second):
        sources = repository.result(session, heading.job.id).summary.get("sources") or {}
        counts.append({name: each["selected"] for name, each in sources.items()})
    sums = [sum(each.values()) or 1 for each in counts]
    shares = {
        name: [each.get(name, 0) / whole for each, whole in zip(counts, sums, strict=True)]
        for name in counts[0].keys() | counts[1].keys()
    }
    ordered = sorted(shares.items(), key=lambda item: (-sum(item[1]), item[0]))
    rows, rest = ordered[:_SOURCES], ordered[_SOURCES:]
    if rest:
        rows.append((f"{len(rest)} more", [sum(share[side] for _, share in rest) for side in (0, 1)]))
    series = [("selected", "this job"), ("random", "the other")]
    return grouped("sources", "Sources of the selections", rows, series, row_title="source", show=percent)
