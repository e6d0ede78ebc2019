"""Charts of a result as they are published, by hand."""

import numpy as np

from service.results.chart_schemas import (
    BUDGET_SOURCES,
    BUDGETS,
    INFLUENCE_BINS,
    LENGTH_BINS,
    MAP_SAMPLES,
    MAX_PAIRS,
    MAX_SOURCES,
    MAX_TARGETS,
    Budgets,
    BudgetSource,
    Charts,
    InfluenceBins,
    LeftOutPairs,
    LengthBins,
    SampleMap,
    ShortlistPairs,
    SourceChart,
    StageChart,
    TargetChart,
    Targets,
)

HOSTILE = "</script><script>alert('\u202eimg')</script><b>&amp;\""


def small_charts(samples: int) -> Charts:
    """Of samples without any source, one of which is selected, by a method that computes nothing."""
    source = SourceChart(
        source="(none)", is_rest=False, pool=samples, left_out=0, selected=1, weight_share=1.0, mean_influence=None
    )
    lengths = LengthBins(
        edges=[1, 10], all=[samples], selected=[1], mean_influence=[None], selected_mean_influence=[None]
    )
    stage = StageChart(stage="prepare", planned_seconds=None, wall_seconds=1.5, compute_seconds=1.25, units=1, reused=0)
    return Charts(
        influence=None,
        landmarks=None,
        shortlist=None,
        sources=[source],
        lengths=lengths,
        targets=Targets(count=0, turns=None, data=[]),
        map=None,
        budgets=None,
        stages=[stage],
    )


def largest_charts(samples: int, budget: int) -> Charts:
    """As many figures of each kind as there may be, with hostile names; budgets go up to the number of samples."""
    draw = np.random.default_rng(3)

    def figures(count: int) -> list[float]:
        return [float(f"{value:.5g}") for value in draw.normal(size=count)]

    def counts(count: int, most: int = 1_000_000) -> list[int]:
        return [int(value) for value in draw.integers(0, most, count)]

    cuts = sorted({budget, *np.geomspace(1, samples, BUDGETS).round().astype(int).tolist()})
    shares = [[count // BUDGET_SOURCES for count in cuts] for _ in range(BUDGET_SOURCES)]
    rest = [count - sum(each) for count, each in zip(cuts, zip(*shares, strict=True), strict=True)]
    return Charts(
        influence=InfluenceBins(
            edges=sorted(figures(INFLUENCE_BINS + 1)),
            all=counts(INFLUENCE_BINS),
            exact=counts(INFLUENCE_BINS, 1_000),
            selected=counts(INFLUENCE_BINS, 10),
        ),
        landmarks=LeftOutPairs(
            count=4096, index=counts(MAX_PAIRS), predicted=figures(MAX_PAIRS), exact=figures(MAX_PAIRS)
        ),
        shortlist=ShortlistPairs(
            count=4096, index=counts(MAX_PAIRS), before=figures(MAX_PAIRS), after=figures(MAX_PAIRS)
        ),
        sources=[
            SourceChart(
                source=f"{HOSTILE} {place}",
                is_rest=place == MAX_SOURCES,
                pool=1_000,
                left_out=2,
                selected=3,
                weight_share=0.01,
                mean_influence=0.5,
            )
            for place in range(MAX_SOURCES + 1)
        ],
        lengths=LengthBins(
            edges=sorted(counts(LENGTH_BINS + 1)),
            all=counts(LENGTH_BINS),
            selected=counts(LENGTH_BINS),
            mean_influence=list(figures(LENGTH_BINS)),
            selected_mean_influence=[None, *figures(LENGTH_BINS - 1)],
        ),
        targets=Targets(
            count=2 * MAX_TARGETS,
            turns=MAX_TARGETS,
            data=[
                TargetChart(
                    index=place,
                    id=f"target {place} {HOSTILE}",
                    counts=place % 9 > 0,
                    r2=0.5,
                    spearman=0.6,
                    influence=0.1,
                    turn=place,
                    took=2,
                    first=[1, 2],
                )
                for place in range(MAX_TARGETS)
            ],
        ),
        map=SampleMap(
            of="embedding",
            shares=[0.2, 0.1],
            count=samples,
            index=sorted(counts(MAP_SAMPLES)),
            x=figures(MAP_SAMPLES),
            y=figures(MAP_SAMPLES),
            influence=figures(MAP_SAMPLES),
            selected=[place % 3 == 0 for place in range(MAP_SAMPLES)],
        ),
        budgets=Budgets(
            order="rank_then_influence",
            budget=budget,
            count=cuts,
            mean_influence=sorted(figures(len(cuts)), reverse=True),
            exact=cuts,
            sources=[
                *(
                    BudgetSource(source=f"{HOSTILE} {place}", is_rest=False, counts=each)
                    for place, each in enumerate(shares)
                ),
                BudgetSource(source="(rest)", is_rest=True, counts=rest),
            ],
        ),
        stages=[
            StageChart(
                stage=f"stage {place}",
                planned_seconds=None if place == 2 else 4.5,
                wall_seconds=1.5,
                compute_seconds=1.25,
                units=1,
                reused=0,
            )
            for place in range(9)
        ],
    )
