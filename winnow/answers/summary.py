"""The summary of a result. Made of docs/openapi.json by `make openapi`: change that."""

from datetime import datetime
from typing import Literal

from winnow.answers.base import Answer
from winnow.answers.jobs import ComparedCosts
from winnow.answers.rows import Excluded, Nonfinite, RenderingNotes, Repeats, UnusableCounts


class Finding(Answer):
    """The object `Finding` of the API."""

    about: Literal["choice", "fidelity", "step", "rows", "duplicates", "overlap", "repeats", "sources"] | str
    """`choice`: how near the selection is to the one from exact gradients. `fidelity`: whether propagation knows more
    than guessing. `step`: what a step on the selection does to the loss, beside one on random samples. `rows`: what
    took no part, was cut or rendered otherwise. `duplicates`: selected samples that say the same. `overlap`: selected
    samples that are of the target too. `repeats`: both, in results of earlier versions. `sources`: whether nearly all
    are of one"""
    level: Literal["ok", "look", "bad"] | str
    """`look`: worth a look before training on it; `bad`: not to be trained on before it is understood"""
    figure: float | None
    """What the level was decided by; null: there is none"""
    meaning: str
    advice: str | None
    """What to do; null: nothing"""


class Histogram(Answer):
    """The object `Histogram` of the API."""

    edges: list[float]
    """One more than there are bins, of equal width"""
    counts: list[int]


class Distribution(Answer):
    """Of the samples that have a value."""

    histogram: Histogram
    """64 bins"""
    quantiles: dict[str, float]
    """By per cent: p0, p1, p5, p25, p50, p75, p95, p99, p100"""
    mean: float
    std: float
    """Standard deviation"""


class SourceCounts(Answer):
    """The object `SourceCounts` of the API."""

    pool: int
    """Samples of the source in the pool; 0 if the pool has more than a thousand sources and this is a later one"""
    selected: int
    weight: float
    """Sum of the weights of its selected samples"""


class RefineRound(Answer):
    """The object `RefineRound` of the API."""

    refined: int
    """Samples computed exactly by then"""
    times_budget: float
    """The same as a multiple of the budget"""
    promise: float | None
    """Share of the best selection's influence, beyond the pool's mean, that the selection is expected to have; null:
    not known yet"""


class Refinement(Answer):
    """The object `Refinement` of the API."""

    refined: int
    """Samples computed exactly by then"""
    times_budget: float
    """The same as a multiple of the budget"""
    promise: float | None
    """Share of the best selection's influence, beyond the pool's mean, that the selection is expected to have; null:
    not known yet"""
    most: int | None
    """How many were allowed"""
    stopped: Literal["promised", "max_cost", "size", "pool"] | str | None
    """Why it ended: the promise was reached, or a limit, or every sample is exact"""
    rounds: list[RefineRound]
    """After each round"""


class FidelityFound(Answer):
    """What leaving each landmark out and predicting it from the others says; null: one side is constant."""

    mean_r2: float | None
    """Of the mean over targets"""
    mean_spearman: float | None
    """Of the mean over targets"""
    r2: list[float | None]
    """Of each target sample that counts"""
    spearman: list[float | None]
    """Of each target sample that counts"""


class KernelUsed(Answer):
    """The object `KernelUsed` of the API."""

    sigma: float | None
    """Width; null: the kernel is linear, or there is none"""
    delta: float | None
    """Ridge"""


class EmbeddingOption(Answer):
    """The object `EmbeddingOption` of the API."""

    kind: str
    pooling: str | None
    blocks: int | None
    tangents: int | None


class EmbeddingCandidate(Answer):
    """The object `EmbeddingCandidate` of the API."""

    kind: str
    pooling: str | None
    blocks: int | None
    tangents: int | None
    cost: float
    """Operations a token, relative to the others"""
    mean_spearman: float | None
    mean_r2: float | None
    chosen: bool


class EmbeddingFound(Answer):
    """The object `EmbeddingFound` of the API."""

    chosen: EmbeddingOption | None
    """null: none had to be chosen"""
    candidates: list[EmbeddingCandidate] | None
    """What `auto` compared; null: nothing"""


class WarmupFound(Answer):
    """The object `WarmupFound` of the API."""

    samples: int
    steps: int
    loss_first: float
    """Of the first step"""
    loss_last: float
    """Of the last step"""
    losses: list[float]
    """At most 200 means over all steps, in order"""


class Solution(Answer):
    """The certificate of the weights of `weighted` (docs/method.md, Select)."""

    support: int
    """Positive weights"""
    ridge: float
    threshold: float
    objective: float
    kkt_residual: float
    duality_gap: float
    iterations: int
    """Newton steps over all ridges that were tried"""
    converged: bool
    clipped_eigenvalues: int
    """Negative eigenvalues of the curvature that were set to 0"""
    clipped_mass: float
    """Their share of all, by absolute value"""
    restricted: bool
    """true: no ridge gives the budget exactly, so samples were left out"""


class LossChange(Answer):
    """Of the mean target loss by one step, in nats a response token; below 0 is better."""

    measured: float
    predicted: float
    """To first order"""
    predicted_second_order: float | None
    """null: the job has no curvature"""


class Held(Answer):
    """The same on half of the targets, by a selection that they had no part in."""

    targets: int
    loss: float
    """Before the step"""
    selection: LossChange
    random: LossChange


class Validation(Answer):
    """The object `Validation` of the API."""

    samples: int
    """Of each step"""
    learning_rate: float
    loss: float
    """Mean target loss before the step"""
    selection: LossChange
    random: LossChange
    """By a step on as many random samples"""
    held_out: Held | None
    """null: there are too few targets"""
    sentence: str
    """The same in words"""


class DatasetCounts(Answer):
    """The object `DatasetCounts` of the API."""

    samples: int
    tokens: int
    """As rendered and cut to `max_length`"""
    squares: int | None
    """Sum of the squares of the lengths"""
    response_tokens: int | None
    """Tokens that are learnt from"""
    longest: int | None
    """Tokens of the longest sample"""
    truncated: int
    """Samples that were cut"""
    truncated_responses: int | None
    """Of these, with a reply that was cut"""


class StageSpent(Answer):
    """The object `StageSpent` of the API."""

    stage: str
    units: int
    reused: int
    """Units whose artifacts were there already"""
    wall_seconds: float
    """From the first start to the last end"""
    compute_seconds: float
    """Of the units that were computed, together"""
    peak_memory_bytes: int | None
    """null: every unit was reused"""


class SelectionResult(Answer):
    """The summary of a succeeded job."""

    object: Literal["selection_result"] | str
    job_id: str
    name: str | None
    """Of the job, now; null: it has none"""
    labels: dict[str, str]
    """Of the job, now"""
    created_at: datetime
    sample_count: int
    """Number of samples in the pool, each with a weight"""
    selected_count: int
    """Number of selected samples"""
    verdict: list[Finding]
    """What to know before training on the selection, the worst first; empty in results of earlier versions"""
    sentences: list[str]
    """The main findings in words"""
    notes: list[str]
    """Among these: what was lowered, excluded or not reached"""
    influence: Distribution | None
    """Of all samples that took part"""
    weight: Distribution | None
    """Of the selected samples"""
    sources: dict[str, SourceCounts] | None
    """By source of the selection, the most frequent first; `(none)`: samples without one"""
    repeats: Repeats | None
    """Samples that say the same as another of the pool, or as one of the target"""
    excluded: Excluded | None
    """What `duplicates: one` and `overlap: exclude` left out of the job; null: nothing"""
    landmark_count: int | None
    """Samples computed as landmarks"""
    refined_count: int | None
    """Samples computed as a shortlist"""
    refinement: Refinement | None
    """null: nothing was refined"""
    fidelity: FidelityFound | None
    kernel: KernelUsed | None
    embedding: EmbeddingFound | None
    scaling_error: float | None
    """Relative error of the factored scaling of Adam"""
    warmup: WarmupFound | None
    """null: there was none"""
    solution: Solution | None
    """null unless the selection is `weighted`"""
    validation: Validation | None
    """null: `validate` is false"""
    unusable: UnusableCounts | None
    """Samples that took no part, because they cannot be rendered or have nothing to learn from"""
    rendering: RenderingNotes | None
    nonfinite: Nonfinite | None
    """Samples that have no finite loss, gradient or embedding"""
    pool: DatasetCounts | None
    target: DatasetCounts | None
    conversations: int | None
    """How many of the selected are messages, not plain text"""
    chat_template: str | None
    """What they were rendered with"""
    dtype: str | None
    device: str | None
    stages: list[StageSpent]
    """In the order of execution"""
    costs: ComparedCosts | None
    """What the job has cost beside other ways to choose, from its own counts of samples and tokens; null: the model's
    shape is unknown, or the job is of an earlier version"""
