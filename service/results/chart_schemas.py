"""What pictures of a result are drawn from: made once, when the results are published, and bounded whatever the pool's size."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_PAIRS = 2_000
"""Points of a scatter plot."""
MAX_SOURCES = 100
MAX_TARGETS = 1_000
MAX_NAMED_PICKS = 2_000
"""Indices of the samples that targets took, over all targets."""
MAP_SAMPLES, MAP_SELECTED = 3_000, 1_000
BUDGETS, BUDGET_SOURCES = 60, 8
INFLUENCE_BINS, LENGTH_BINS = 50, 30

Figures = list[float]
Counts = list[int]
Means = list[float | None]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class InfluenceBins(_Strict):
    """Histograms over the same bins. A sample without an influence is in none of them."""

    edges: Figures = Field(
        description=f"One more than there are bins, of which there are {INFLUENCE_BINS}", examples=[[-0.1, 0.0, 0.1]]
    )
    all: Counts = Field(description="Samples of the pool in each bin", examples=[[420, 180]])
    exact: Counts = Field(description="Of these, those whose influence was computed", examples=[[40, 60]])
    selected: Counts = Field(description="Of these, the selected", examples=[[0, 60]])


class LeftOutPairs(_Strict):
    """Landmarks, each predicted from the others, beside what was computed for it: the mean over the targets that count."""

    count: int = Field(description=f"Landmarks in all; of more than {MAX_PAIRS} an even part is here", examples=[4096])
    index: Counts = Field(description="Positions in the pool", examples=[[3, 17]])
    predicted: Figures = Field(description="Influence predicted with the landmark left out", examples=[[0.11, 0.32]])
    exact: Figures = Field(description="Influence from its own gradient", examples=[[0.14, 0.29]])


class ShortlistPairs(_Strict):
    """Samples that were computed exactly because of what had been predicted for them."""

    count: int = Field(description=f"Samples in all; of more than {MAX_PAIRS} an even part is here", examples=[2400])
    index: Counts = Field(description="Positions in the pool", examples=[[5, 99]])
    before: Figures = Field(description="Influence that was predicted when it was chosen", examples=[[0.41, 0.38]])
    after: Figures = Field(description="Influence from its own gradient", examples=[[0.35, 0.44]])


class SourceChart(_Strict):
    source: str = Field(description="`(none)`: samples without a source", examples=["word_problem"])
    is_rest: bool = Field(
        description=f"true: the sum of all sources that have no entry of their own; the {MAX_SOURCES} largest have one, by their"
        " share of the pool or of the selection",
    )
    pool: int = Field(description="Samples in the pool", examples=[120])
    left_out: int = Field(
        description="Of these, samples that took no part: unusable, not finite or excluded", examples=[2]
    )
    selected: int = Field(examples=[35])
    weight_share: float = Field(description="Its share of the sum of all weights", examples=[0.58])
    mean_influence: float | None = Field(
        description="Over its samples in the pool that took part; null: there are none, or the method computes none",
        examples=[0.21],
    )


class LengthBins(_Strict):
    """Tokens of the samples as they were rendered and cut to `max_length`."""

    edges: Counts = Field(
        description="Bin i holds lengths from edges[i] on and below edges[i + 1]", examples=[[1, 64, 256]]
    )
    all: Counts = Field(description="Samples that took part", examples=[[200, 390]])
    selected: Counts = Field(examples=[[12, 48]])
    mean_influence: Means = Field(
        description="Over those that took part; null: none, or the method computes none", examples=[[0.1, 0.2]]
    )
    selected_mean_influence: Means = Field(description="Over the selected; null: none", examples=[[0.5, 0.6]])


class TargetChart(_Strict):
    index: int = Field(description="Position in the target, from 0", examples=[3])
    id: str = Field(description="The target sample's own id", examples=["dev-3"])
    counts: bool = Field(description="false: it is unusable or not finite, and was excluded")
    r2: float | None = Field(
        description="Of its influence as predicted for left-out landmarks; null: unknown", examples=[0.41]
    )
    spearman: float | None = Field(description="Rank correlation of the same; null: unknown", examples=[0.62])
    influence: float | None = Field(
        description="Mean influence of the selected samples on it; null: unknown", examples=[0.33]
    )
    turn: int | None = Field(
        description="Its place in the round robin, from 0: it took the samples of rank `turn`, `turn` + `turns` and so on; null:"
        " it took none, or the selection is not by round robin",
        examples=[0],
    )
    took: int | None = Field(description="Samples it took; null: the selection is not by round robin", examples=[4])
    first: Counts = Field(description="The first of them: positions in the pool", examples=[[17, 311]])


class Targets(_Strict):
    count: int = Field(description=f"Target samples in all, of which the first {MAX_TARGETS:,} are here", examples=[48])
    turns: int | None = Field(
        description="Target samples that take turns; null: the selection is not by round robin", examples=[48]
    )
    data: list[TargetChart]


class SampleMap(_Strict):
    """Samples as points: the two directions of the largest variance (principal components) of what `of` says."""

    of: Literal["embedding", "influence"] = Field(
        description="`embedding`: what influence was propagated by; `influence`: the influence on each target, of methods without"
        " an embedding"
    )
    shares: list[float] = Field(description="Of the variance, along x and y", examples=[[0.21, 0.09]])
    count: int = Field(
        description=f"Samples that took part; here are at most {MAP_SELECTED:,} of the selected and others drawn at random, at"
        f" most {MAP_SAMPLES:,} together",
        examples=[598],
    )
    index: Counts = Field(description="Positions in the pool, rising", examples=[[0, 1]])
    x: Figures = Field(examples=[[0.1, -0.2]])
    y: Figures = Field(examples=[[0.3, 0.1]])
    influence: Figures = Field(examples=[[0.2, 0.4]])
    selected: list[bool] = Field(examples=[[False, True]])


class BudgetSource(_Strict):
    source: str = Field(examples=["word_problem"])
    is_rest: bool = Field(description="true: all sources that have no entry of their own")
    counts: Counts = Field(description="Its samples at each budget", examples=[[1, 35]])


class Budgets(_Strict):
    """The selection cut shorter or longer, without computing anything anew: entry i of each list is of budget count[i]."""

    order: Literal["rank_then_influence", "influence"] = Field(
        description="`rank_then_influence`: up to the job's budget its own selection by rank, which a smaller budget is the start"
        " of; then the other samples by influence, which the rule of the job might take in another order. `influence`: all"
        " samples by influence, because a selection by `weighted` is not the start of a larger one"
    )
    budget: int = Field(description="The job's own", examples=[60])
    count: Counts = Field(description=f"About {BUDGETS} budgets, rising", examples=[[1, 60, 600]])
    mean_influence: Figures = Field(examples=[[0.91, 0.52, 0.11]])
    exact: Counts = Field(description="Samples whose influence was computed", examples=[[1, 60, 180]])
    sources: list[BudgetSource] = Field(description=f"The {BUDGET_SOURCES} largest, and the rest")


class StageChart(_Strict):
    stage: str = Field(examples=["embed"])
    planned_seconds: float | None = Field(
        description="By the last plan, which is made once tokens are counted, less what was there already; null: it was not"
        " planned, or no rate was known",
        examples=[12.5],
    )
    wall_seconds: float = Field(
        description="From its first start to its last end; 0: it was planned and not needed", examples=[11.2]
    )
    compute_seconds: float = Field(description="Of all its units together", examples=[20.9])
    units: int = Field(examples=[4])
    reused: int = Field(description="Units whose artifacts were there already", examples=[0])


Nullable = Field(description="null: the method computes no such figure, or the result has none of these samples")


class Charts(_Strict):
    """What is stored."""

    influence: Annotated[InfluenceBins | None, Nullable]
    landmarks: Annotated[LeftOutPairs | None, Nullable]
    shortlist: Annotated[ShortlistPairs | None, Nullable]
    sources: list[SourceChart] = Field(description="The largest first, by share of the pool or of the selection")
    lengths: LengthBins
    targets: Targets
    map: Annotated[SampleMap | None, Nullable]
    budgets: Annotated[Budgets | None, Nullable]
    stages: list[StageChart] = Field(description="In the order of execution")


class ResultCharts(Charts):
    """The figures that pictures of a result are drawn from, made when it was published. Figures have five significant digits."""

    object: Literal["result_charts"] = "result_charts"
    job_id: str = Field(examples=["job_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    created_at: datetime
