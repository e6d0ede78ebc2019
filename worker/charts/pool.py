"""Charts of the pool's samples: influence, sources, token lengths, and other budgets."""

import numpy as np
import numpy.typing as npt

from service.datasets.values import OTHER_SOURCES
from service.results.chart_schemas import (
    BUDGET_SOURCES,
    BUDGETS,
    INFLUENCE_BINS,
    LENGTH_BINS,
    MAX_SOURCES,
    Budgets,
    BudgetSource,
    InfluenceBins,
    LengthBins,
    SourceChart,
)
from worker.charts.samples import Ints, PoolSamples, figures, rounded

_LEAST_BUDGET = 0.001  # of the pool


def influence_bins(samples: PoolSamples) -> InfluenceBins | None:
    if not samples.has_influence:
        return None
    values = samples.influence[samples.eligible].astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if low == high:  # bins to both sides, wide enough that a large value can tell them apart
        pad = max(0.5, abs(low) / 2)
        low, high = low - pad, high + pad
    edges = np.linspace(low, high, INFLUENCE_BINS + 1)

    def counts(of: npt.NDArray[np.float32]) -> list[int]:
        found: list[int] = np.histogram(of.astype(np.float64), bins=edges)[0].tolist()
        return found

    return InfluenceBins(
        edges=edges.tolist(),  # not rounded: the first and the last are values
        all=counts(samples.influence[samples.eligible]),
        exact=counts(samples.influence[samples.exact]),
        selected=counts(samples.influence[samples.selected]),
    )


def sources(samples: PoolSamples) -> list[SourceChart]:
    """The sources that are largest in the pool or in the selection, and the sum of the others."""
    of = samples.source
    total = len(samples.names) + 1
    taking_part = np.bincount(of[samples.eligible], minlength=total)
    pool = np.bincount(of, minlength=total)
    selected = np.bincount(of[samples.selected], minlength=total)
    weight = np.bincount(of, weights=samples.weight, minlength=total)
    influence = np.bincount(
        of[samples.eligible], weights=samples.influence[samples.eligible].astype(np.float64), minlength=total
    )
    named = _largest(samples)[:MAX_SOURCES]
    rest = np.setdiff1d(np.arange(total), named)

    def entry(name: str, places: Ints, *, is_rest: bool) -> SourceChart:
        count = int(taking_part[places].sum())
        return SourceChart(
            source=name,
            is_rest=is_rest,
            pool=pool[places].sum(),
            left_out=pool[places].sum() - count,
            selected=selected[places].sum(),
            weight_share=rounded(weight[places].sum() / weight.sum()),
            mean_influence=rounded(influence[places].sum() / count) if count and samples.has_influence else None,
        )

    found = [entry(samples.names[place], np.array([place]), is_rest=False) for place in named]
    return [*found, entry(OTHER_SOURCES, rest, is_rest=True)] if pool[rest].any() else found


def _largest(samples: PoolSamples) -> Ints:
    """Places of the sources that have a name, the largest first by the larger of their shares of pool and selection."""
    count = len(samples.names)
    of_pool = np.bincount(samples.source, minlength=count)[:count] / len(samples.source)
    of_selected = np.bincount(samples.source[samples.selected], minlength=count)[:count] / len(samples.selected)
    return np.argsort(-np.maximum(of_pool, of_selected), kind="stable")


def length_bins(samples: PoolSamples) -> LengthBins:
    """Bins of equal ratio, as far as whole numbers allow."""
    low, high = max(int(samples.length.min()), 1), int(samples.length.max()) + 1
    edges = np.unique(np.round(np.geomspace(low, max(high, low + 1), LENGTH_BINS + 1)).astype(np.int64))
    edges[0] = min(int(samples.length.min()), edges[0])
    place = np.searchsorted(edges, samples.length, side="right") - 1

    def counted(rows: npt.NDArray[np.bool_] | Ints) -> tuple[list[int], list[float | None]]:
        counts = np.bincount(place[rows], minlength=len(edges) - 1)
        sums = np.bincount(place[rows], weights=samples.influence[rows].astype(np.float64), minlength=len(edges) - 1)
        pairs = zip(sums.tolist(), counts.tolist(), strict=True)
        return counts.tolist(), [rounded(s / c) if c and samples.has_influence else None for s, c in pairs]

    every, mean_influence = counted(samples.eligible)
    selected, selected_mean = counted(samples.selected)
    return LengthBins(
        edges=edges.tolist(),
        all=every,
        selected=selected,
        mean_influence=mean_influence,
        selected_mean_influence=selected_mean,
    )


def budgets(samples: PoolSamples, selection: str) -> Budgets | None:
    """`selection`: the parameter."""
    if not samples.has_influence:
        return None
    order = _order(samples, is_nested=selection != "weighted")
    count, own = len(order), len(samples.selected)
    counts = np.unique([*np.round(np.geomspace(max(1, _LEAST_BUDGET * count), count, BUDGETS)).astype(np.int64), own])
    total = np.cumsum(samples.influence[order], dtype=np.float64)
    exact = np.cumsum(samples.exact[order])
    named = _largest(samples)[:BUDGET_SOURCES]
    place_of = np.full(len(samples.names) + 1, len(named))
    place_of[named] = np.arange(len(named))
    place = place_of[samples.source[order]]
    parts = np.stack(
        [np.bincount(part, minlength=len(named) + 1) for part in np.split(place, counts[:-1])]
    )  # what each budget has beyond the one before
    of_source = np.cumsum(parts, axis=0).T.tolist()
    names = [*(samples.names[place] for place in named), OTHER_SOURCES]
    found = [
        BudgetSource(source=name, is_rest=place == len(named), counts=each)
        for place, (name, each) in enumerate(zip(names, of_source, strict=True))
    ]
    return Budgets(
        order="influence" if selection == "weighted" else "rank_then_influence",
        budget=own,
        count=counts.tolist(),
        mean_influence=figures(total[counts - 1] / counts),
        exact=exact[counts - 1].tolist(),
        sources=found if of_source[-1][-1] else found[:-1],
    )


def _order(samples: PoolSamples, *, is_nested: bool) -> Ints:
    """All samples that took part, as a budget that grows would take them; of equal influence the lower index first."""
    first = samples.selected if is_nested else np.empty(0, np.int64)
    left = samples.eligible.copy()
    left[first] = False
    rest = np.flatnonzero(left)
    return np.concatenate([first, rest[np.argsort(-samples.influence[rest], kind="stable")]])
