"""The pictures of a result, each from its part of the stored charts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.results.chart_schemas import (
    Budgets,
    InfluenceBins,
    LeftOutPairs,
    LengthBins,
    SampleMap,
    ShortlistPairs,
    SourceChart,
    StageChart,
)
from service.web.formats import duration, number, percent
from service.web.plots.bars import grouped, stacked
from service.web.plots.histogram import histogram
from service.web.plots.lines import Curve, curve, steps
from service.web.plots.scatter import Map, MapPoint, against, sample_map
from service.web.plots.svg import Chart

_DRAWN_SOURCES = 10


def influence(found: InfluenceBins) -> Chart:
    series = [
        ("all", "whole pool", found.all),
        ("exact", "computed exactly", found.exact),
        ("selected", "selected", found.selected),
    ]
    return histogram("influence", "Influence of the samples", found.edges, series, x_title="influence")


def landmarks(found: LeftOutPairs) -> Chart:
    return against(
        "landmarks",
        "Landmarks, each predicted from the others",
        found.predicted,
        found.exact,
        x_title="predicted influence",
        y_title="exact influence",
    )


def shortlist(found: ShortlistPairs) -> Chart:
    return against(
        "shortlist",
        "The shortlist, before and after it was computed",
        found.before,
        found.after,
        x_title="influence before",
        y_title="exact influence",
    )


def sources(found: Sequence[SourceChart]) -> Chart:
    """Shares of the pool beside shares of the selection; what is not among the first ones is one row."""
    pool = sum(each.pool for each in found) or 1
    selected = sum(each.selected for each in found) or 1
    shares = [(each.source, each.pool / pool, each.selected / selected) for each in found]
    rows, rest = shares[:_DRAWN_SOURCES], shares[_DRAWN_SOURCES:]
    if rest:
        rows.append((f"{len(rest)} more", sum(share[1] for share in rest), sum(share[2] for share in rest)))
    return grouped(
        "sources",
        "Sources of pool and selection",
        [(source, shares) for source, *shares in rows],
        [("all", "share of the pool"), ("selected", "share of the selection")],
        row_title="source",
        show=percent,
    )


def lengths(found: LengthBins) -> Chart:
    return steps(
        "lengths",
        "Influence by length",
        found.edges,
        [("all", "whole pool", found.mean_influence), ("selected", "selected", found.selected_mean_influence)],
        [("samples", found.all), ("selected samples", found.selected)],
        x_title="tokens",
        y_title="mean influence",
    )


def validation(found: Mapping[str, Any]) -> Chart:
    """What a step did to the loss: of the summary's `validation`."""
    on = [("all targets", found)]
    if found["held_out"]:
        on.append((f"{found['held_out']['targets']} targets that had no part in the choice", found["held_out"]))
    rows = [(label, [each[arm]["measured"] for arm in ("selection", "random")]) for label, each in reversed(on)]
    return grouped(
        "validation",
        "Change of the loss by one training step",
        rows,
        [("selected", "on the selection"), ("random", "on as many random samples")],
        row_title="measured on",
    )


def stages(found: Sequence[StageChart]) -> Chart:
    return grouped(
        "stages",
        "Time planned and spent by stage",
        [(each.stage, [each.planned_seconds, each.compute_seconds]) for each in found],
        [("all", "planned"), ("selected", "spent computing")],
        row_title="stage",
        show=duration,
    )


def sample_points(found: SampleMap) -> Map:
    columns = (found.x, found.y, found.index, found.influence, found.selected)
    points = [MapPoint(*values) for values in zip(*columns, strict=True)]
    what = "their embedding" if found.of == "embedding" else "their influence on each target"
    return sample_map("map", f"Samples by {what}", points)


@dataclass(frozen=True, slots=True)
class RecutSource:
    """A source at a budget, beside its share of the pool (None: unknown)."""

    name: str
    count: int
    share: float
    pool_share: float | None


@dataclass(frozen=True, slots=True)
class Recut:
    """The selection at another budget: `place` in the list of budgets."""

    place: int
    count: int
    mean_influence: float
    exact: int
    sources: list[RecutSource]


def recut(found: Budgets, pool: Sequence[SourceChart], budget: int) -> Recut:
    """At the budget that is nearest to this one."""
    place = min(range(len(found.count)), key=lambda place: abs(found.count[place] - budget))
    count, whole = found.count[place], sum(each.pool for each in pool) or 1
    in_pool = {each.source: each.pool / whole for each in pool if not each.is_rest}
    named = sum(in_pool.get(each.source, 0.0) for each in found.sources if not each.is_rest)
    shown = [
        RecutSource(
            name="all others" if each.is_rest else each.source,
            count=each.counts[place],
            share=each.counts[place] / count,
            pool_share=1 - named if each.is_rest else in_pool.get(each.source),
        )
        for each in found.sources
    ]
    return Recut(place, count, found.mean_influence[place], found.exact[place], shown)


def budgets(found: Budgets, place: int) -> Curve:
    return curve(
        "budgets",
        "Mean influence by budget",
        found.count,
        found.mean_influence,
        x_title="samples selected, logarithmic",
        y_title="mean influence",
        marked=place,
    )


def recut_sources(found: Recut) -> Chart:
    """The pool's bar, and that of the selection at the budget."""
    rows = [
        ("pool", [each.pool_share or 0.0 for each in found.sources]),
        ("selection at this budget", [each.share for each in found.sources]),
    ]
    return stacked("recut", "Sources at this budget", rows, [each.name for each in found.sources], row_title="of")


def recut_data(found: Budgets, drawn: Curve) -> dict[str, Any]:
    """What the script of the page needs to cut anew."""
    return {
        "count": found.count,
        "mean": [number(value) for value in found.mean_influence],
        "exact": found.exact,
        "places": drawn.places,
        "sources": [each.counts for each in found.sources],
    }
