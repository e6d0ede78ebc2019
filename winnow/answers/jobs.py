"""Jobs: their state, plan and events. Made of docs/openapi.json by `make openapi`: change that."""

from datetime import datetime
from typing import Any, Literal, TypeAlias

from winnow.answers.base import Answer
from winnow.answers.parameters import JobParameters

JobStatus: TypeAlias = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"] | str


Stage: TypeAlias = (
    Literal[
        "prepare",
        "warmup",
        "landmark_gradients",
        "target_gradients",
        "candidates",
        "choose_embedding",
        "curvature",
        "embed",
        "embed_target",
        "propagate",
        "refine",
        "select",
        "validate",
    ]
    | str
)


class Progress(Answer):
    """Progress of the current phase."""

    phase: Stage
    done: int
    total: int
    unit: Literal["samples"] | str
    seconds_left: float | None
    """Estimate for this phase from its pace so far"""


class StageReport(Answer):
    """One stage: units finished and in total, units found in the artifact store, wall-clock time from first start to
    last end."""

    stage: Stage
    units: int
    units_done: int
    units_reused: int
    done: int
    total: int
    started_at: datetime | None
    finished_at: datetime | None
    seconds: float | None


class AttemptError(Answer):
    """The object `AttemptError` of the API."""

    attempt: int
    code: str
    detail: str


class UnusableSample(Answer):
    """A sample that takes no part in a job."""

    index: int
    """Position in the dataset, from 0"""
    id: str
    reason: str
    """A short code"""
    detail: str
    """What is wrong with it"""


class UnusableSamples(Answer):
    """The unusable samples of a dataset."""

    count: int
    by_reason: dict[str, int]
    first: list[UnusableSample]
    """The first of them"""


class JobError(Answer):
    """The object `JobError` of the API."""

    code: str
    detail: str
    stage: Stage | None
    shard: int | None
    attempts: int | None
    history: list[AttemptError]
    """The reason of each failed attempt of the unit"""
    unusable: dict[str, UnusableSamples] | None
    """With the code `too_many_unusable`: the dataset that exceeds `max_unusable`"""


class SelectionJob(Answer):
    """The object `SelectionJobOut` of the API."""

    object: Literal["selection_job"] | str
    id: str
    name: str | None
    """null: it has none"""
    labels: dict[str, str]
    status: JobStatus
    phase: Stage | None
    """The stage that the job is in; null before it starts and after it ends"""
    progress: Progress | None
    stages: list[StageReport]
    model: dict[str, Any]
    pool: str
    target: str
    budget: int | None
    """null: a share of a pool that is still being imported"""
    parameters: JobParameters
    metadata: dict[str, str]
    error: JobError | None
    retry_of: str | None
    """The job that this one retries"""
    reproduces: str | None
    """The job that this one reproduces"""
    created_at: datetime
    started_at: datetime | None
    cancel_requested_at: datetime | None
    finished_at: datetime | None


class StagePlan(Answer):
    """The object `StagePlan` of the API."""

    stage: Stage
    operations: float | None
    """Floating-point operations of matrix products; a multiply-add is two"""
    seconds: float | None
    """For one worker, excluding what already exists; null: no rate is known"""
    artifact_bytes: int | None
    memory_bytes: int | None
    """Of the compute process, on the device and in main memory"""
    already_there: float
    """Share of the stage's work that is already in the store from your earlier jobs"""


class PlanTotals(Answer):
    """Sums of the known figures; for memory, the maximum over the stages."""

    operations: float | None
    seconds: float | None
    artifact_bytes: int | None
    memory_bytes: int | None


class Cost(Answer):
    """What a choice costs, without the preparation of the data, the warm-up and the validation."""

    operations: float
    """Floating-point operations of matrix products; a multiply-add is two"""
    paper_operations: float
    """By the formula of the method's paper: 2 d T for a forward pass through all d weights over all T tokens of the
    pool, three times that for gradients; without targets, projection, attention and output head (docs/method.md)"""
    seconds: float | None
    """For one worker that finds nothing done, at the rates that workers have measured; null: of one of the stages there
    is none. In a result, of this job: the computing time of its units"""


class ComparedCosts(Answer):
    """What the job costs (in a plan, at most), beside other ways to choose from the same pool with the same model."""

    job: Cost
    rds_plus: Cost
    """The same job with method `rds_plus`"""
    exact_influence: Cost
    """The same job with method `exact_influence`"""
    authors: Cost
    """The same job as the method's authors set it: 4,096 landmarks (or all of the pool), JVP of 4 blocks with 2
    tangents, last token, ridge 0.01, nothing refined"""
    warmup: Cost | None
    """What the warm-up costs in addition, whatever the method; null: there is none"""
    rds_plus_ratio: float | None
    """How many times the operations of this job `rds_plus` needs; null: this job needs none"""
    rds_plus_ratio_by_paper: float | None
    """The same by the paper's formula"""


class RefineCap(Answer):
    """The most samples that `refine` with size `auto` computes; operations are those of matrix products."""

    samples: int
    times_budget: float
    allowed_operations: float | None
    fixed_operations: float | None
    operations_per_sample: float | None
    is_floor: bool
    unknown: str | None


class Candidates(Answer):
    """The embeddings that `auto` compares on the landmarks."""

    kinds: list[str]
    output_from: float | None
    """The least `refine.max_cost` with which `output` is one of them: it then leaves twice the budget to refine, or the
    rest of the pool. null: `output` is none, since `refine` has no cap or the model's shape is unknown"""


class SelectionPlan(Answer):
    """What a job would do and what it would cost."""

    object: Literal["selection_plan"] | str
    model: dict[str, Any]
    pool: str
    target: str
    budget: int
    parameters: JobParameters
    stages: list[StagePlan]
    totals: PlanTotals
    costs: ComparedCosts | None
    """Operations and seconds of this job beside other ways to choose; null: the model's shape is unknown"""
    refine_cap: RefineCap | None
    """How many samples may be refined: what `refine.max_cost` allows, but no fewer than twice the budget. null: the job
    refines as many as it says, or approximates nothing"""
    candidates: Candidates | None
    """null: `embedding.kind` is not `auto`, or not used"""
    note: str | None
    """Set if the exact method would cost less than twice this job"""
    warnings: list[str]
    """What was lowered, what does not fit, and why figures are missing"""
    tokens: dict[str, int]
    estimated: bool
    """Tokens are estimated from bytes; the job counts them and updates the plan"""
    device: str | None
    """Of the most recent worker"""


NoEstimate: TypeAlias = Literal["not_queued", "importing", "no_worker", "no_rate", "long_queue"] | str


class QueuePlace(Answer):
    """Where a job is in the queue, as of `as_of`. Nothing of it is a promise: others may post jobs, workers come and
    go."""

    object: Literal["queue_place"] | str
    job_id: str
    status: JobStatus
    own_jobs_before: int | None
    """Your tenant's queued jobs that workers take before it; null: it is not in the queue"""
    jobs_before: int | None
    """Queued jobs, of all tenants, that are expected to start before it; null: not known"""
    workers: int
    """Live workers that can do it"""
    starts_at: datetime | None
    """When its first unit may start, estimated; null: not known"""
    no_estimate: NoEstimate | None
    """Why `starts_at` is null: the job is not queued; a dataset of it is being imported; no live worker can do it; how
    long something before it takes is not known yet; more than 10,000 jobs have not ended"""
    as_of: datetime


class Event(Answer):
    """The object `EventOut` of the API."""

    id: int
    type: str
    created_at: datetime
    data: dict[str, Any]
