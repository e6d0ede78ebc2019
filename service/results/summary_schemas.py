"""The summary of a result, field by field. A result keeps what the version that computed it wrote, so every field may be absent,
and what this version does not know is answered as it is."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from service.plan.compared_costs import ComparedCosts


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)


class Histogram(_Open):
    edges: list[float] = Field(description="One more than there are bins, of equal width", examples=[[0.0, 0.5, 1.0]])
    counts: list[int] = Field(examples=[[3, 9]])


class Distribution(_Open):
    """Of the samples that have a value."""

    histogram: Histogram = Field(description="64 bins")
    quantiles: dict[str, float] = Field(
        description="By per cent: p0, p1, p5, p25, p50, p75, p95, p99, p100",
        examples=[{"p0": -0.1, "p50": 0.1, "p100": 0.9}],
    )
    mean: float = Field(examples=[0.12])
    std: float = Field(description="Standard deviation", examples=[0.08])


class SourceCounts(_Open):
    pool: int = Field(
        description="Samples of the source in the pool; 0 if the pool has more than a thousand sources and this is a later one",
        examples=[50],
    )
    selected: int = Field(examples=[12])
    weight: float = Field(description="Sum of the weights of its selected samples", examples=[12.0])


class Repeat(_Open):
    id: str = Field(description="Of the selected sample", examples=["flan-17"])
    same_as: str = Field(description="Id of the sample that it repeats", examples=["flan-3"])


class RepeatsInPool(_Open):
    exact: int = Field(
        description="Samples that repeat another exactly: case, white space and Unicode forms aside", examples=[12]
    )
    near: int = Field(description="Samples that repeat another but for some words", examples=[3])
    repeated: int = Field(description="How many other samples they repeat", examples=[9])


class RepeatsFound(_Open):
    pool: RepeatsInPool | None = Field(default=None, description="null in results of earlier versions")
    excluded: int | None = Field(default=None, description="Samples that an option left out", examples=[0])
    count: int = Field(description="Selected samples that repeat one", examples=[1])
    first: list[Repeat] = Field(description="At most a hundred of these")


class Repeats(_Open):
    duplicates: RepeatsFound | None = Field(default=None, description="Of another sample of the pool")
    overlap: RepeatsFound | None = Field(default=None, description="Of a sample of the target")


class ExcludedRow(_Open):
    index: int = Field(examples=[17])
    id: str = Field(examples=["row-17"])
    reason: Literal["duplicate", "overlap"]
    same_as: str = Field(
        description="Id of the sample of the pool, or of the target, that it repeats", examples=["row-3"]
    )


class Excluded(_Open):
    count: int = Field(examples=[1])
    by_reason: dict[str, int] = Field(examples=[{"duplicate": 1}])
    first: list[ExcludedRow] = Field(description="At most a hundred")


class RefineRound(_Open):
    refined: int = Field(description="Samples computed exactly by then", examples=[120])
    times_budget: float = Field(description="The same as a multiple of the budget", examples=[2.0])
    promise: float | None = Field(
        description="Share of the best selection's influence, beyond the pool's mean, that the selection is expected to have;"
        " null: not known yet",
        examples=[0.95],
    )


class Refinement(RefineRound):
    most: int | None = Field(default=None, description="How many were allowed", examples=[480])
    stopped: Literal["promised", "max_cost", "size", "pool"] | None = Field(
        default=None, description="Why it ended: the promise was reached, or a limit, or every sample is exact"
    )
    rounds: list[RefineRound] = Field(default=[], description="After each round")


class FidelityFound(_Open):
    """What leaving each landmark out and predicting it from the others says; null: one side is constant."""

    mean_r2: float | None = Field(description="Of the mean over targets", examples=[0.5])
    mean_spearman: float | None = Field(description="Of the mean over targets", examples=[0.71])
    r2: list[float | None] = Field(description="Of each target sample that counts", examples=[[0.4, 0.6]])
    spearman: list[float | None] = Field(description="Of each target sample that counts", examples=[[0.6, 0.7]])


class KernelUsed(_Open):
    sigma: float | None = Field(description="Width; null: the kernel is linear, or there is none", examples=[1.1])
    delta: float | None = Field(description="Ridge", examples=[0.03])


class EmbeddingOption(_Open):
    kind: str = Field(examples=["text"])
    pooling: str | None = Field(default=None, examples=["response"])
    blocks: int | None = Field(default=None, examples=[4])
    tangents: int | None = Field(default=None, examples=[2])


class EmbeddingCandidate(EmbeddingOption):
    cost: float = Field(description="Operations a token, relative to the others", examples=[0.2])
    mean_spearman: float | None = Field(examples=[0.7])
    mean_r2: float | None = Field(examples=[0.5])
    chosen: bool


class EmbeddingFound(_Open):
    chosen: EmbeddingOption | None = Field(description="null: none had to be chosen")
    candidates: list[EmbeddingCandidate] | None = Field(description="What `auto` compared; null: nothing")


class WarmupFound(_Open):
    samples: int = Field(examples=[1000])
    steps: int = Field(examples=[125])
    loss_first: float = Field(description="Of the first step", examples=[2.1])
    loss_last: float = Field(description="Of the last step", examples=[1.7])
    losses: list[float] = Field(description="At most 200 means over all steps, in order", examples=[[2.1, 1.7]])


class Solution(_Open):
    """The certificate of the weights of `weighted` (docs/method.md, Select)."""

    support: int = Field(description="Positive weights", examples=[60])
    ridge: float
    threshold: float
    objective: float
    kkt_residual: float = Field(examples=[1e-12])
    duality_gap: float = Field(examples=[1e-12])
    iterations: int = Field(description="Newton steps over all ridges that were tried", examples=[31])
    converged: bool
    clipped_eigenvalues: int = Field(
        description="Negative eigenvalues of the curvature that were set to 0", examples=[0]
    )
    clipped_mass: float = Field(description="Their share of all, by absolute value", examples=[0.0])
    restricted: bool = Field(description="true: no ridge gives the budget exactly, so samples were left out")


class LossChange(_Open):
    """Of the mean target loss by one step, in nats a response token; below 0 is better."""

    measured: float = Field(examples=[-0.011])
    predicted: float = Field(description="To first order", examples=[-0.012])
    predicted_second_order: float | None = Field(description="null: the job has no curvature", examples=[None])


class HeldOut(_Open):
    """The same on half of the targets, by a selection that they had no part in."""

    targets: int = Field(examples=[12])
    loss: float = Field(description="Before the step", examples=[1.9])
    selection: LossChange
    random: LossChange


class Validation(_Open):
    samples: int = Field(description="Of each step", examples=[16])
    learning_rate: float = Field(examples=[1e-4])
    loss: float = Field(description="Mean target loss before the step", examples=[1.9])
    selection: LossChange
    random: LossChange = Field(description="By a step on as many random samples")
    held_out: HeldOut | None = Field(description="null: there are too few targets")
    sentence: str = Field(description="The same in words")


class UnusableRow(_Open):
    index: int = Field(examples=[17])
    id: str = Field(examples=["row-17"])
    reason: str = Field(examples=["no_reply"])
    detail: str | None = Field(default=None, examples=["the reply is empty"])


class UnusableRows(_Open):
    count: int = Field(examples=[1])
    by_reason: dict[str, int] = Field(examples=[{"no_reply": 1}])
    first: list[UnusableRow] = Field(description="At most a hundred")


class UnusableCounts(_Open):
    pool: UnusableRows
    target: UnusableRows


class RenderingNotes(_Open):
    """How often the rendered text is not all that the messages say, by the code of a note."""

    pool: dict[str, int] = Field(examples=[{"system_folded": 3}])
    target: dict[str, int] = Field(examples=[{}])


class NamedSample(_Open):
    index: int = Field(examples=[17])
    id: str = Field(examples=["row-17"])


class NonfiniteRows(_Open):
    count: int = Field(examples=[0])
    samples: list[NamedSample] = Field(description="At most a hundred", examples=[[]])


class Nonfinite(_Open):
    pool: NonfiniteRows
    target: NonfiniteRows


class DatasetCounts(_Open):
    samples: int = Field(examples=[600])
    tokens: int = Field(description="As rendered and cut to `max_length`", examples=[51_200])
    squares: int | None = Field(default=None, description="Sum of the squares of the lengths", examples=[5_000_000])
    response_tokens: int | None = Field(default=None, description="Tokens that are learnt from", examples=[21_000])
    longest: int | None = Field(default=None, description="Tokens of the longest sample", examples=[256])
    truncated: int = Field(description="Samples that were cut", examples=[4])
    truncated_responses: int | None = Field(
        default=None, description="Of these, with a reply that was cut", examples=[2]
    )


class StageSpent(_Open):
    stage: str = Field(examples=["embed"])
    units: int = Field(examples=[4])
    reused: int = Field(description="Units whose artifacts were there already", examples=[0])
    wall_seconds: float = Field(description="From the first start to the last end", examples=[11.2])
    compute_seconds: float = Field(description="Of the units that were computed, together", examples=[20.9])
    peak_memory_bytes: int | None = Field(description="null: every unit was reused", examples=[1_200_000_000])


class Summary(_Open):
    """What a method does not compute is null."""

    sentences: list[str] = Field(default=[], description="The main findings in words")
    notes: list[str] = Field(default=[], description="Among these: what was lowered, excluded or not reached")
    influence: Distribution | None = Field(default=None, description="Of all samples that took part")
    weight: Distribution | None = Field(default=None, description="Of the selected samples")
    sources: dict[str, SourceCounts] | None = Field(
        default=None, description="By source of the selection, the most frequent first; `(none)`: samples without one"
    )
    repeats: Repeats | None = Field(
        default=None, description="Samples that say the same as another of the pool, or as one of the target"
    )
    excluded: Excluded | None = Field(
        default=None, description="What `duplicates: one` and `overlap: exclude` left out of the job; null: nothing"
    )
    landmark_count: int | None = Field(default=None, description="Samples computed as landmarks", examples=[128])
    refined_count: int | None = Field(default=None, description="Samples computed as a shortlist", examples=[120])
    refinement: Refinement | None = Field(default=None, description="null: nothing was refined")
    fidelity: FidelityFound | None = None
    kernel: KernelUsed | None = None
    embedding: EmbeddingFound | None = None
    scaling_error: float | None = Field(
        default=None, description="Relative error of the factored scaling of Adam", examples=[None]
    )
    warmup: WarmupFound | None = Field(default=None, description="null: there was none")
    solution: Solution | None = Field(default=None, description="null unless the selection is `weighted`")
    validation: Validation | None = Field(default=None, description="null: `validate` is false")
    unusable: UnusableCounts | None = Field(
        default=None,
        description="Samples that took no part, because they cannot be rendered or have nothing to learn from",
    )
    rendering: RenderingNotes | None = None
    nonfinite: Nonfinite | None = Field(
        default=None, description="Samples that have no finite loss, gradient or embedding"
    )
    pool: DatasetCounts | None = None
    target: DatasetCounts | None = None
    conversations: int | None = Field(
        default=None, description="How many of the selected are messages, not plain text", examples=[60]
    )
    chat_template: str | None = Field(
        default=None, description="What they were rendered with", examples=["the model's own"]
    )
    dtype: str | None = Field(default=None, examples=["float32"])
    device: str | None = Field(default=None, examples=["cpu"])
    stages: list[StageSpent] = Field(default=[], description="In the order of execution")
    costs: ComparedCosts | None = Field(
        default=None,
        description="What the job has cost beside other ways to choose, from its own counts of samples and tokens; null: the"
        " model's shape is unknown, or the job is of an earlier version",
    )
