"""Results of jobs. Made of docs/openapi.json by `make openapi`: change that."""

from datetime import datetime
from typing import Any, Literal

from winnow.answers.base import Answer
from winnow.answers.datasets import Message
from winnow.answers.jobs import ComparedCosts


class Finding(Answer):
    """The object `Finding` of the API."""

    about: Literal["choice", "fidelity", "step", "rows", "repeats", "sources"] | str
    """`choice`: how near the selection is to the one from exact gradients. `fidelity`: whether propagation knows more
    than guessing. `step`: what a step on the selection does to the loss, beside one on random samples. `rows`: what
    took no part, was cut or rendered otherwise. `repeats`: selected samples that say the same, or are of the target.
    `sources`: whether nearly all are of one"""
    level: Literal["ok", "look", "bad"] | str
    """`look`: worth a look before training on it; `bad`: not to be trained on before it is understood"""
    figure: float | None
    """What the level was decided by; null: there is none"""
    meaning: str
    advice: str | None
    """What to do; null: nothing"""


class SelectionResult(Answer):
    """The summary."""

    object: Literal["selection_result"] | str
    job_id: str
    created_at: datetime
    sample_count: int
    """Number of samples in the pool, each with a weight"""
    selected_count: int
    """Number of selected samples"""
    verdict: list[Finding]
    """What to know before training on the selection, the worst first; empty in results of earlier versions"""
    costs: ComparedCosts | None
    """What the job has cost beside other ways to choose, from its own counts of samples and tokens; null: the model's
    shape is unknown, or the job is of an earlier version"""


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


class Weight(Answer):
    """The object `WeightOut` of the API."""

    index: int
    """Position in the pool, from 0"""
    id: str
    """The sample's own id in the pool"""
    source: str | None
    influence: float | None
    """How much training on it helps the target; higher is better. null: it took no part, because it is unusable or not
    finite"""
    weight: float
    """0 if it was not selected"""
    exact: bool
    """true: the influence was computed; false: propagated from landmarks"""


class Selected(Answer):
    """The object `SelectedOut` of the API."""

    index: int
    """Position in the pool, from 0"""
    id: str
    """The sample's own id in the pool"""
    source: str | None
    influence: float
    """How much training on it helps the target; higher is better"""
    weight: float
    """0 if it was not selected"""
    exact: bool
    """true: the influence was computed; false: propagated from landmarks"""
    rank: int
    """0 is the first selected"""


class TargetInfluence(Answer):
    """The object `TargetInfluence` of the API."""

    index: int
    """Position in the target, from 0"""
    id: str
    """The target sample's own id"""
    influence: float | None
    """The sample's influence on this target sample; null: it does not count"""
    counts: bool
    """false: it is unusable or has no finite gradient and is excluded from the mean"""


class TargetsPage(Answer):
    """The influence on each sample of the target, in order; `last_id` is the index of the last, for `targets_after`."""

    object: Literal["list"] | str
    data: list[TargetInfluence]
    has_more: bool
    last_id: int | None
    """`after` for the next page; null if this page is empty"""


class Landmark(Answer):
    """The object `LandmarkOut` of the API."""

    index: int
    """Position in the pool, from 0"""
    id: str
    """The landmark's own id in the pool"""
    source: str | None
    influence: float
    """Its own influence, from its gradient; on `target` if given"""
    kernel: float
    """Similarity of the embeddings of sample and landmark; with the Gaussian kernel, 1 if they are equal"""
    contribution: float
    """Its contribution to the sample's influence: the kernel times the landmark's coefficient in the kernel ridge
    regression, whose sign may differ from that of its influence"""
    share: float
    """Absolute size of its contribution relative to all contributions: 0 to 1"""


class OtherLandmarks(Answer):
    """The sum over all landmarks that are not listed."""

    count: int
    contribution: float
    share: float


class Explanation(Answer):
    """The components of the sample's influence. The contributions of `landmarks` and `others` add up to `influence`."""

    explained_by: Literal["own_gradient", "landmarks", "embedding_similarity", "none"] | str
    """Where the influence comes from. `none`: the sample has none, or the method computes none"""
    sentence: str
    """The same in words"""
    target: int | None
    """The requested target sample; null: the mean over those that count"""
    reason: str | None
    """Why the sample took no part: a reason of `unusable` in the result, or `not_finite`; null: it took part"""
    influence: float | None
    """What is explained: the sample's influence, or its influence on `target`; null: there is none"""
    targets: TargetsPage | None
    """null if the sample has no influence"""
    landmarks: list[Landmark]
    """Largest contribution first, regardless of sign; empty unless landmarks contributed"""
    others: OtherLandmarks | None
    """null unless landmarks contributed"""


class Sample(Answer):
    """One sample of the pool: its content, its influence and weight, and why."""

    index: int
    """Position in the pool, from 0"""
    id: str
    """The sample's own id in the pool"""
    source: str | None
    influence: float | None
    """How much training on it helps the target; higher is better. null: it took no part, because it is unusable or not
    finite"""
    weight: float
    """0 if it was not selected"""
    exact: bool
    """true: the influence was computed; false: propagated from landmarks"""
    object: Literal["sample"] | str
    job_id: str
    selected: bool
    rank: int | None
    """0 is the first selected; null if it was not selected"""
    messages: list[Message] | None
    tools: list[dict[str, Any]] | None
    text: str | None
    content_missing: str | None
    """Why messages and text are missing"""
    explanation: Explanation | None
    explanation_missing: str | None
    """Why there is no explanation, and what to do"""


class Provenance(Answer):
    """The immutable audit record."""

    object: Literal["provenance"] | str
    job_id: str
    created_at: datetime
    weights_root: str
    """Merkle root of the weights, 16,384 samples per leaf. leaf = sha256 of the influences (float32; null is the NaN
    0x7fc00000), weights (float32) and exact flags (one byte, 0 or 1), little-endian; node = sha256(0x01 || left ||
    right); the last node of an odd level is promoted."""
    chunk_sha256: list[str] | None
    """With `chunks`: the leaves; null if the job has been deleted"""
    record: dict[str, Any]
    """Request, inputs, code, environment, parameters and units of the job"""
