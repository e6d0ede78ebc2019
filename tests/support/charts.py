"""Charts of a result as they are published, by hand."""

from service.results.chart_schemas import Charts, LengthBins, SourceChart, StageChart, Targets


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
