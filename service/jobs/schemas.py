"""Selection jobs as the client sees them. Unknown fields are refused; every default is written out in the job's answer."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)

from service.jobs.parameters import JobParameters, Parameters
from service.jobs.state import JobStatus, Stage
from service.models import HubModel
from service.pages import NumberedPage


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


Budget = Annotated[
    Annotated[StrictInt, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1, strict=True)], WrapValidator(_check_budget)
]
ModelName = Annotated[str | HubModel, WrapValidator(_check_model)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


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
    target: str = Field(description="The dataset of examples of what is wanted (32 to 500 are usual)")
    budget: Budget = Field(
        description="How many samples to select: a number, or a fraction of the pool between 0 and 1"
    )
    metadata: dict[str, MetadataValue] = Field(default_factory=dict, description="Yours; at most 16 entries")
    dry_run: bool = Field(default=False, description="Only check the request and answer 200 with its plan and cost")

    @field_validator("metadata")
    @classmethod
    def _few(cls, metadata: dict[str, str]) -> dict[str, str]:
        if len(metadata) > 16 or any(not 0 < len(key) <= 64 for key in metadata):
            raise ValueError("at most 16 entries, with keys of 1 to 64 characters")
        if any("\0" in text for entry in metadata.items() for text in entry):
            raise ValueError("must not contain the NUL character")  # PostgreSQL does not store it
        return metadata

    def parameters(self) -> dict[str, Any]:
        return self.model_dump(mode="json", include=set(Parameters.model_fields))


class StagePlan(BaseModel):
    stage: Stage
    operations: float | None = Field(description="Floating-point operations of matrix products; a multiply-add is two")
    seconds: float | None = Field(description="Of one worker, for what is not there yet; null: no rate is known")
    artifact_bytes: int | None
    memory_bytes: int | None = Field(description="Of the compute process, on the device and beside it")
    already_there: float = Field(description="Share of the stage's work that your earlier jobs have left in the store")


class PlanTotals(BaseModel):
    """Sums of the figures that are known; of memory, the most that a stage needs."""

    operations: float | None
    seconds: float | None
    artifact_bytes: int | None
    memory_bytes: int | None


class SelectionPlan(BaseModel):
    """What a job would do and cost."""

    object: Literal["selection_plan"] = "selection_plan"
    model: dict[str, Any] = Field(examples=[{"kind": "registered", "name": "smollm2-135m-instruct"}])
    pool: str
    target: str
    budget: int
    parameters: JobParameters
    stages: list[StagePlan]
    totals: PlanTotals
    exact_operations: float | None = Field(description="Of the same job by method exact_influence")
    note: str | None = Field(description="Where the exact method would cost less than twice this job")
    warnings: list[str] = Field(description="What is lowered, what does not fit, and why figures are missing")
    tokens: dict[str, int] = Field(examples=[{"pool": 532377, "target": 9120}])
    estimated: bool = Field(
        description="Tokens are estimated from bytes; the job counts them and writes the plan again"
    )
    device: str | None = Field(description="Of the worker seen last")


class Progress(BaseModel):
    """Of the phase that the job is in."""

    phase: Stage
    done: int
    total: int
    unit: Literal["samples"] = "samples"
    seconds_left: float | None = Field(default=None, description="Of this phase, at its pace so far")


class StageReport(BaseModel):
    """One stage: units finished and in all, those found in the artifact store, wall seconds from first start to last end."""

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


class JobError(BaseModel):
    code: str = Field(examples=["model_not_usable"])
    detail: str
    stage: Stage | None = None
    shard: int | None = None
    attempts: int | None = None
    history: list[AttemptError] = Field(default_factory=list, description="Why each failed attempt of the unit failed")


class SelectionJobOut(BaseModel):
    object: Literal["selection_job"] = "selection_job"
    id: str
    status: JobStatus
    phase: Stage | None = Field(description="The stage that the job is in; null before it starts and after it ends")
    progress: Progress | None
    stages: list[StageReport]
    model: dict[str, Any] = Field(examples=[{"kind": "registered", "name": "smollm2-135m-instruct"}])
    pool: str
    target: str
    budget: int
    parameters: JobParameters
    metadata: dict[str, str]
    error: JobError | None
    retry_of: str | None = Field(description="The job that this one is posted again of")
    reproduces: str | None = Field(description="The job whose provenance this one computes anew")
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
    """Events oldest first; `after` = the last `last_id` continues, also while the job runs."""
