"""Selection jobs as the client sees them. Unknown fields are refused; every default is written out in the job's answer."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    SkipValidation,
    StrictInt,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)

from service.datasets.presets import MAX_COUNT, PRESETS
from service.http.pagination import NumberedPage
from service.jobs.naming import JobName, Labels
from service.ledger.state import JobStatus
from service.models.registry import HubModel
from service.names import Name, Text, check_name
from service.plan.compared_costs import ComparedCosts
from service.plan.parameters import JobParameters, Parameters
from service.plan.refine_cap import RefineCap
from service.plan.stages import Stage


def _check_budget(value: Any, check: ValidatorFunctionWrapHandler) -> int | float:
    """One error for the field, not one for each member of the union under a name of pydantic's."""
    try:
        budget: int | float = check(value)
    except ValidationError as error:
        raise ValueError("a whole number of samples, at least 1, or a fraction between 0 and 1") from error
    return budget


def _check_model(value: Any, check: ValidatorFunctionWrapHandler) -> str | HubModel:
    """Errors in {id, revision} under their own names (`model.revision`)."""
    if isinstance(value, dict):
        return HubModel.model_validate(value)
    try:
        model: str | HubModel = check(value)
    except ValidationError as error:
        raise ValueError("a registered name, a hub id owner/name, or {id, revision}") from error
    return model


class PresetTarget(BaseModel):
    """A ready-made target (GET /v1/targets), imported from the hub."""

    model_config = ConfigDict(extra="forbid")

    preset: str = Field(json_schema_extra={"enum": list(PRESETS)})
    count: StrictInt | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        description="How many samples; null: as many as the list says",
        examples=[48],
    )
    seed: StrictInt = Field(default=0, ge=0, lt=2**32, description="Which samples: the same ones for the same seed")
    revision: Name = Field(
        default="main",
        min_length=1,
        max_length=200,
        description="Of the dataset on the hub; it is resolved to a commit",
    )

    @field_validator("preset")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in PRESETS:
            raise ValueError(f"there is none of this name; the ready-made targets are {', '.join(PRESETS)}")
        return name

    @field_validator("count")
    @classmethod
    def _enough(cls, count: int | None, found: ValidationInfo) -> int | None:
        preset = PRESETS.get(found.data.get("preset", ""))
        if count is not None and preset is not None and count > preset.samples:
            raise ValueError(f"{preset.name} has {preset.samples} samples; take at most as many")
        return count


def _check_target(value: Any, check: ValidatorFunctionWrapHandler) -> str | PresetTarget:
    """Errors in {preset, count} under their own names (`target.count`)."""
    if isinstance(value, dict):
        return PresetTarget.model_validate(value)
    try:
        target: str | PresetTarget = check(value)
    except ValidationError as error:
        raise ValueError("the id of a dataset (ds_...), or a ready-made target: {preset, count}") from error
    return target


Budget = Annotated[
    Annotated[StrictInt, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1, strict=True)], WrapValidator(_check_budget)
]
ModelName = Annotated[str | HubModel, WrapValidator(_check_model)]
Target = Annotated[str | PresetTarget, WrapValidator(_check_target)]
MetadataValue = Annotated[Text, StringConstraints(max_length=512)]


class JobRequest(Parameters):
    """Which samples of `pool` help `target` most, for `model`?"""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "smollm2-135m-instruct",
                    "pool": "ds_0193a1b2c3d4e5f60718293a4b5c6d7e",
                    "target": "ds_0193a1b2c3d4e5f60718293a4b5c6d7f",
                    "budget": 60,
                    "landmarks": {"count": 128},
                }
            ]
        },
    )

    model: ModelName = Field(
        description="A registered name (GET /v1/models), or a hub id owner/name, or {id, revision}"
    )
    pool: str = Field(description="The dataset to select from")
    target: Target = Field(
        description="The dataset of examples of the desired behaviour (usually 32 to 500), or a ready-made target"
    )
    budget: Budget = Field(
        description="How many samples to select: a number, or a fraction of the pool between 0 and 1"
    )
    name: JobName | None = Field(
        default=None, description="What you call the job; need not be unique", examples=["gsm8k, lr 3e-4"]
    )
    labels: Labels = Field(default_factory=dict, description="By which lists can be filtered, and which can be changed")
    metadata: dict[str, MetadataValue] = Field(default_factory=dict, description="Your own key-value pairs; at most 16")
    dry_run: bool = Field(default=False, description="Only validate the request and return 200 with its plan and cost")

    @field_validator("metadata")
    @classmethod
    def _few(cls, metadata: dict[str, str]) -> dict[str, str]:
        if len(metadata) > 16 or any(not 0 < len(key) <= 64 for key in metadata):
            raise ValueError("at most 16 entries, with keys of 1 to 64 characters")
        for key in metadata:
            check_name(key)
        return metadata

    def parameters(self) -> dict[str, Any]:
        return self.model_dump(mode="json", include=set(Parameters.model_fields))


class StagePlan(BaseModel):
    stage: Stage
    operations: float | None = Field(description="Floating-point operations of matrix products; a multiply-add is two")
    seconds: float | None = Field(description="For one worker, excluding what already exists; null: no rate is known")
    artifact_bytes: int | None
    memory_bytes: int | None = Field(description="Of the compute process, on the device and in main memory")
    already_there: float = Field(
        description="Share of the stage's work that is already in the store from your earlier jobs"
    )


class PlanTotals(BaseModel):
    """Sums of the known figures; for memory, the maximum over the stages."""

    operations: float | None
    seconds: float | None
    artifact_bytes: int | None
    memory_bytes: int | None


class Candidates(BaseModel):
    """The embeddings that `auto` compares on the landmarks."""

    kinds: list[str] = Field(examples=[["text", "text_hidden", "hidden"]])
    output_from: float | None = Field(
        description="The least `refine.max_cost` with which `output` is one of them: it then leaves twice the budget to refine,"
        " or the rest of the pool. null: `output` is none, since `refine` has no cap or the model's shape is unknown"
    )


class SelectionPlan(BaseModel):
    """What a job would do and what it would cost."""

    object: Literal["selection_plan"] = "selection_plan"
    model: dict[str, Any] = Field(examples=[{"kind": "registered", "name": "smollm2-135m-instruct"}])
    pool: str
    target: str
    budget: int
    parameters: JobParameters
    stages: list[StagePlan]
    totals: PlanTotals
    costs: ComparedCosts | None = Field(
        description="Operations and seconds of this job beside other ways to choose; null: the model's shape is unknown"
    )
    refine_cap: RefineCap | None = Field(
        default=None,
        description="How many samples may be refined: what `refine.max_cost` allows, but no fewer than twice the budget. null:"
        " the job refines as many as it says, or approximates nothing",
    )
    candidates: Candidates | None = Field(default=None, description="null: `embedding.kind` is not `auto`, or not used")
    note: str | None = Field(description="Set if the exact method would cost less than twice this job")
    warnings: list[str] = Field(description="What was lowered, what does not fit, and why figures are missing")
    tokens: dict[str, int] = Field(examples=[{"pool": 532377, "target": 9120}])
    estimated: bool = Field(description="Tokens are estimated from bytes; the job counts them and updates the plan")
    device: str | None = Field(description="Of the most recent worker")


class Progress(BaseModel):
    """Progress of the current phase."""

    phase: Stage
    done: int
    total: int
    unit: Literal["samples"] = "samples"
    seconds_left: float | None = Field(default=None, description="Estimate for this phase from its pace so far")


class StageReport(BaseModel):
    """One stage: units finished and in total, units found in the artifact store, wall-clock time from first start to last end."""

    stage: Stage
    units: int
    units_done: int
    units_reused: int
    done: int
    total: int
    started_at: datetime | None
    finished_at: datetime | None
    seconds: float | None


class AttemptError(BaseModel):
    attempt: int
    code: str
    detail: str


class UnusableSample(BaseModel):
    """A sample that takes no part in a job."""

    index: int = Field(description="Position in the dataset, from 0", examples=[17])
    id: str = Field(examples=["word_problem-0017"])
    reason: str = Field(description="A short code", examples=["no_reply"])
    detail: str = Field(
        description="What is wrong with it", examples=["it has no token to learn from: its replies are empty"]
    )


class UnusableSamples(BaseModel):
    """The unusable samples of a dataset."""

    count: int
    by_reason: dict[str, int] = Field(examples=[{"no_reply": 3}])
    first: list[UnusableSample] = Field(description="The first of them")


class JobError(BaseModel):
    code: str = Field(examples=["model_not_usable"])
    detail: str
    stage: Stage | None = None
    shard: int | None = None
    attempts: int | None = None
    history: list[AttemptError] = Field(
        default_factory=list, description="The reason of each failed attempt of the unit"
    )
    unusable: dict[Literal["pool", "target"], UnusableSamples] | None = Field(
        default=None, description="With the code `too_many_unusable`: the dataset that exceeds `max_unusable`"
    )


# Answered as they are stored, without a look: they were validated when the job was created.
StoredParameters = Annotated[JobParameters, SkipValidation, PlainSerializer(lambda stored: stored)]


class SelectionJobOut(BaseModel):
    object: Literal["selection_job"] = "selection_job"
    id: str
    name: str | None = Field(description="null: it has none", examples=["gsm8k, lr 3e-4"])
    labels: dict[str, str] = Field(examples=[{"team": "search"}])
    status: JobStatus
    phase: Stage | None = Field(description="The stage that the job is in; null before it starts and after it ends")
    progress: Progress | None
    stages: list[StageReport]
    model: dict[str, Any] = Field(examples=[{"kind": "registered", "name": "smollm2-135m-instruct"}])
    pool: str
    target: str
    budget: int | None = Field(description="null: a share of a pool that is still being imported")
    parameters: StoredParameters
    metadata: dict[str, str]
    error: JobError | None
    retry_of: str | None = Field(description="The job that this one retries")
    reproduces: str | None = Field(description="The job that this one reproduces")
    created_at: datetime
    started_at: datetime | None
    cancel_requested_at: datetime | None
    finished_at: datetime | None


class EventOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    type: str = Field(examples=["unit.claimed"])
    created_at: datetime
    data: dict[str, Any]


class EventPage(NumberedPage[EventOut]):
    """Events, oldest first; `after` = the last `last_id` continues, even while the job runs."""
