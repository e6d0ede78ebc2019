"""What pictures of a result are drawn from. Made of docs/openapi.json by `make openapi`: change that."""

from datetime import datetime
from typing import Literal

from winnow.answers.base import Answer


class InfluenceBins(Answer):
    """Histograms over the same bins. A sample without an influence is in none of them."""

    edges: list[float]
    """One more than there are bins, of which there are 50"""
    all: list[int]
    """Samples of the pool in each bin"""
    exact: list[int]
    """Of these, those whose influence was computed"""
    selected: list[int]
    """Of these, the selected"""


class LeftOutPairs(Answer):
    """Landmarks, each predicted from the others, beside what was computed for it: the mean over the targets that count."""

    count: int
    """Landmarks in all; of more than 2000 an even part is here"""
    index: list[int]
    """Positions in the pool"""
    predicted: list[float]
    """Influence predicted with the landmark left out"""
    exact: list[float]
    """Influence from its own gradient"""


class ShortlistPairs(Answer):
    """Samples that were computed exactly because of what had been predicted for them."""

    count: int
    """Samples in all; of more than 2000 an even part is here"""
    index: list[int]
    """Positions in the pool"""
    before: list[float]
    """Influence that was predicted when it was chosen"""
    after: list[float]
    """Influence from its own gradient"""


class SourceChart(Answer):
    """The object `SourceChart` of the API."""

    source: str
    """`(none)`: samples without a source"""
    is_rest: bool
    """true: the sum of all sources that have no entry of their own; the 100 largest have one, by their share of the
    pool or of the selection"""
    pool: int
    """Samples in the pool"""
    left_out: int
    """Of these, samples that took no part: unusable, not finite or excluded"""
    selected: int
    weight_share: float
    """Its share of the sum of all weights"""
    mean_influence: float | None
    """Over its samples in the pool that took part; null: there are none, or the method computes none"""


class LengthBins(Answer):
    """Tokens of the samples as they were rendered and cut to `max_length`."""

    edges: list[int]
    """Bin i holds lengths from edges[i] on and below edges[i + 1]"""
    all: list[int]
    """Samples that took part"""
    selected: list[int]
    mean_influence: list[float | None]
    """Over those that took part; null: none, or the method computes none"""
    selected_mean_influence: list[float | None]
    """Over the selected; null: none"""


class TargetChart(Answer):
    """The object `TargetChart` of the API."""

    index: int
    """Position in the target, from 0"""
    id: str
    """The target sample's own id"""
    counts: bool
    """false: it is unusable or not finite, and was excluded"""
    r2: float | None
    """Of its influence as predicted for left-out landmarks; null: unknown"""
    spearman: float | None
    """Rank correlation of the same; null: unknown"""
    influence: float | None
    """Mean influence of the selected samples on it; null: unknown"""
    turn: int | None
    """Its place in the round robin, from 0: it took the samples of rank `turn`, `turn` + `turns` and so on; null: it
    took none, or the selection is not by round robin"""
    took: int | None
    """Samples it took; null: the selection is not by round robin"""
    first: list[int]
    """The first of them: positions in the pool"""


class Targets(Answer):
    """The object `Targets` of the API."""

    count: int
    """Target samples in all, of which the first 1,000 are here"""
    turns: int | None
    """Target samples that take turns; null: the selection is not by round robin"""
    data: list[TargetChart]


class SampleMap(Answer):
    """Samples as points: the two directions of the largest variance (principal components) of what `of` says."""

    of: Literal["embedding", "influence"] | str
    """`embedding`: what influence was propagated by; `influence`: the influence on each target, of methods without an
    embedding"""
    shares: list[float]
    """Of the variance, along x and y"""
    count: int
    """Samples that took part; here are at most 1,000 of the selected and others drawn at random, at most 3,000 together"""
    index: list[int]
    """Positions in the pool, rising"""
    x: list[float]
    y: list[float]
    influence: list[float]
    selected: list[bool]


class BudgetSource(Answer):
    """The object `BudgetSource` of the API."""

    source: str
    is_rest: bool
    """true: all sources that have no entry of their own"""
    counts: list[int]
    """Its samples at each budget"""


class Budgets(Answer):
    """The selection cut shorter or longer, without computing anything anew: entry i of each list is of budget count[i]."""

    order: Literal["rank_then_influence", "influence"] | str
    """`rank_then_influence`: up to the job's budget its own selection by rank, which a smaller budget is the start of;
    then the other samples by influence, which the rule of the job might take in another order. `influence`: all samples
    by influence, because a selection by `weighted` is not the start of a larger one"""
    budget: int
    """The job's own"""
    count: list[int]
    """About 60 budgets, rising"""
    mean_influence: list[float]
    exact: list[int]
    """Samples whose influence was computed"""
    sources: list[BudgetSource]
    """The 8 largest, and the rest"""


class StageChart(Answer):
    """The object `StageChart` of the API."""

    stage: str
    planned_seconds: float | None
    """By the last plan, which is made once tokens are counted, less what was there already; null: it was not planned,
    or no rate was known"""
    wall_seconds: float
    """From its first start to its last end; 0: it was planned and not needed"""
    compute_seconds: float
    """Of all its units together"""
    units: int
    reused: int
    """Units whose artifacts were there already"""


class ResultCharts(Answer):
    """The figures that pictures of a result are drawn from, made when it was published. Figures have five significant
    digits."""

    influence: InfluenceBins | None
    """null: the method computes no such figure, or the result has none of these samples"""
    landmarks: LeftOutPairs | None
    """null: the method computes no such figure, or the result has none of these samples"""
    shortlist: ShortlistPairs | None
    """null: the method computes no such figure, or the result has none of these samples"""
    sources: list[SourceChart]
    """The largest first, by share of the pool or of the selection"""
    lengths: LengthBins
    targets: Targets
    map: SampleMap | None
    """null: the method computes no such figure, or the result has none of these samples"""
    budgets: Budgets | None
    """null: the method computes no such figure, or the result has none of these samples"""
    stages: list[StageChart]
    """In the order of execution"""
    object: Literal["result_charts"] | str
    job_id: str
    created_at: datetime
