"""`/jobs/{id}/results`: what a job found, judged, drawn and to be downloaded."""

from typing import Any, Literal
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from service.auth.authentication import ReadDep
from service.db.engine import SessionDep
from service.http.errors import Unprocessable
from service.results import repository
from service.results import router as results_api
from service.results.chart_schemas import Charts
from service.results.formats import Format
from service.results.presets import Preset
from service.web import pictures
from service.web.admission import logged_in
from service.web.formats import number, percent
from service.web.job_heading import Heading, finished
from service.web.rendering import HEADERS, render

router = APIRouter(include_in_schema=False, dependencies=[Depends(logged_in)])

_MOST_TARGETS = 12
FINDINGS = {
    "choice": "The choice",
    "fidelity": "What was propagated",
    "step": "A training step",
    "rows": "The rows",
    "repeats": "Repeats",
    "overlap": "Pool and target",
    "duplicates": "Duplicates",
    "sources": "The sources",
}
_DOWNLOADS = (
    ("Selection with texts, Parquet", {"format": "parquet", "selected_only": "true", "include": "messages"}),
    ("Selection with texts, JSON lines", {"format": "jsonl", "selected_only": "true", "include": "messages"}),
    ("Selection, CSV", {"format": "csv", "selected_only": "true"}),
    ("All weights, Parquet", {"format": "parquet"}),
    ("All weights, CSV", {"format": "csv"}),
)
_FOR_TRAINING = {
    Preset.TRL: "TRL",
    Preset.TRL_MESSAGES: "TRL, whole conversations",
    Preset.OPENAI: "OpenAI",
    Preset.AXOLOTL: "axolotl",
    Preset.LLAMAFACTORY: "LLaMA-Factory, ShareGPT",
    Preset.LLAMAFACTORY_ALPACA: "LLaMA-Factory, Alpaca",
    Preset.LLAMAFACTORY_V1: "LLaMA-Factory, version 1",
    Preset.ROWS: "Rows as they are kept",
}


@router.get("/jobs/{job_id}/results")
def result_page(
    request: Request, job_id: str, session: SessionDep, principal: ReadDep, budget: str | None = None
) -> Response:
    heading = finished(session, principal.tenant_id, job_id)
    stored = repository.result(session, job_id)
    charts = _charts(session, job_id)
    session.commit()  # no transaction is open while the page is drawn
    summary = stored.summary
    drawn = {} if charts is None else _drawn(charts, summary, stored.sample_count, budget)
    return render(
        request,
        "result.html",
        **heading.values(),
        samples=stored.sample_count,
        summary=summary,
        verdict=summary.get("verdict") or [],
        findings=FINDINGS,
        figures=_figures(summary),
        charts=charts,
        most_targets=_MOST_TARGETS,
        sentences=summary.get("sentences") or [],
        downloads=[(label, urlencode(query)) for label, query in _DOWNLOADS],
        for_training=[(label, urlencode({"preset": preset})) for preset, label in _FOR_TRAINING.items()],
        **drawn,
    )


def _charts(session: Session, job_id: str) -> Charts | None:
    row = repository.charts(session, job_id)
    return None if row is None else Charts.model_validate(row.charts)


def _drawn(charts: Charts, summary: dict[str, Any], samples: int, budget: str | None) -> dict[str, Any]:
    """The pictures, each with how to read it, and the selection at the budget, by default the job's."""
    found = []
    if charts.influence is not None:
        text = "Higher is better: a step on the sample lowers the target's loss by more."
        found.append((pictures.influence(charts.influence), text))
    if charts.sources:
        found.append((pictures.sources(charts.sources), "Where the selection comes from, beside what there was."))
    if charts.landmarks is not None:
        text = "Near the diagonal, predictions can be trusted; a cloud without a direction is a guess."
        found.append((pictures.landmarks(charts.landmarks), text))
    if charts.shortlist is not None:
        text = "What was promising, and what its own gradient said."
        found.append((pictures.shortlist(charts.shortlist), text))
    if summary.get("validation"):
        found.append((pictures.validation(summary["validation"]), "Lower is better."))
    found.append((pictures.lengths(charts.lengths), "Whether long or short samples are favoured."))
    if charts.stages:
        found.append((pictures.stages(charts.stages), "What was there already took no time."))
    values: dict[str, Any] = {
        "pictures": found,
        "map": pictures.sample_points(charts.map) if charts.map is not None else None,
    }
    if charts.budgets is not None:
        wanted = charts.budgets.budget if budget is None else _parsed(budget, samples)
        recut = pictures.recut(charts.budgets, charts.sources, wanted)
        curve = pictures.budgets(charts.budgets, recut.place)
        values |= {
            "recut": recut,
            "budget_curve": curve.chart,
            "recut_sources": pictures.recut_sources(recut),
            "recut_data": {**pictures.recut_data(charts.budgets, curve), "samples": samples},
        }
    return values


def _parsed(budget: str, samples: int) -> int:
    """A number of samples, of one or of a percentage.

    Raises:
        Unprocessable: it is neither.
    """
    try:
        value = float(budget.strip().removesuffix("%"))
        wanted = round(value / 100 * samples if budget.strip().endswith("%") else value)
    except (ValueError, OverflowError) as error:
        raise Unprocessable(
            "budget: a number of samples, or a share of the pool such as 2%.", param="budget"
        ) from error
    return wanted


def _figures(summary: dict[str, Any]) -> list[tuple[str, str, str | None]]:
    """The key numbers that the method computed: label, value, note."""
    refinement, fidelity = summary.get("refinement") or {}, summary.get("fidelity") or {}
    found: list[tuple[str, str, str | None]] = []
    if (influence := summary.get("influence")) is not None:
        found.append(("Mean influence of the pool", number(influence["mean"]), None))
    exact = (summary.get("landmark_count") or 0) + (summary.get("refined_count") or 0)
    if exact:
        found.append(
            ("Computed exactly", number(exact), f"{number(summary['refined_count'])} of them in the shortlist")
        )
    if refinement.get("promise") is not None:
        found.append(("Promise", percent(refinement["promise"]), "of the best selection's influence"))
    if fidelity.get("mean_spearman") is not None:
        found.append(("Fidelity", number(fidelity["mean_spearman"], 2), "rank correlation; 1 is exact"))
    return found


@router.get("/jobs/{job_id}/map")
def map_points(job_id: str, session: SessionDep, principal: ReadDep) -> Response:
    """What the script of the result needs to find the sample under the pointer: [x, y, index, influence] of each point."""
    finished(session, principal.tenant_id, job_id)
    charts = _charts(session, job_id)
    points = pictures.sample_points(charts.map).targets if charts is not None and charts.map is not None else []
    return JSONResponse(points, headers=HEADERS)


@router.get("/jobs/{job_id}/targets")
def targets_page(request: Request, job_id: str, session: SessionDep, principal: ReadDep) -> Response:
    heading: Heading = finished(session, principal.tenant_id, job_id)
    charts = _charts(session, job_id)
    targets = charts.targets if charts is not None else None
    return render(request, "targets.html", **heading.values(), found=targets)


@router.get("/jobs/{job_id}/export")
def export(
    job_id: str,
    request: Request,
    session: SessionDep,
    principal: ReadDep,
    format: Format = Format.PARQUET,
    selected_only: bool = False,
    include: Literal["messages"] | None = None,
    preset: Preset | None = None,
) -> Response:
    """The download of the API, for who is logged in."""
    return results_api.export(job_id, request, session, principal, format, selected_only, include, preset=preset)
