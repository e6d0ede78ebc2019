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

from service.jobs.state import JobStatus, Stage
from service.models import HubModel


class _Strict(BaseModel):
    # Infinity and NaN are no JSON, so PostgreSQL would refuse the echo of them.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Landmarks(_Strict):
    """The samples whose gradients are computed exactly."""

    count: int = Field(default=4096, ge=2, le=65_536, description="Lowered to the number of usable samples of the pool")


class Embedding(_Strict):
    """The cheap embedding of every sample (docs/method.md, Embeddings)."""

    kind: Literal["jvp", "hidden"] = "jvp"
    pooling: Literal["last", "response"] = "response"
    blocks: int = Field(
        default=4, ge=1, le=256, description="The first blocks of the model, the only ones that are run"
    )
    tangents: int = Field(default=2, ge=1, le=16, description="Random directions; `jvp` only")


class Gradient(_Strict):
    """Exact per-sample gradients of the MLPs' down projections."""

    projection_dim: int = Field(default=8192, ge=64, le=1_048_576, description="Of all layers together")
    normalize: bool = Field(default=True, description="Influence as cosine; false: as the plain inner product")


class Kernel(_Strict):
    """Kernel ridge regression from embeddings to influence."""

    kind: Literal["rbf", "linear"] = "rbf"
    ridge: float = Field(default=0.01, gt=0, le=100, description="As a share of the kernel's mean diagonal")
    bandwidth: float | None = Field(default=None, gt=0, description="null: the median distance between landmarks")


class Parameters(_Strict):
    """How to compute. All of it is echoed by the job and kept in its provenance."""

    method: Literal["influence_distillation"] = "influence_distillation"
    landmarks: Landmarks = Landmarks()
    embedding: Embedding = Embedding()
    gradient: Gradient = Gradient()
    kernel: Kernel = Kernel()
    selection: Literal["round_robin", "top_k", "weighted"] = Field(
        default="round_robin",
        description="`round_robin`: targets take turns; `top_k`: by mean influence; both weigh the selected equally."
        " `weighted`: the closed-form first-order weights.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 where the worker's device computes it faster, else float32"
    )
    max_length: int = Field(
        default=2048, ge=16, le=131_072, description="Tokens a sample; longer ones are cut, and counted"
    )
    seed: int = Field(default=0, ge=0, lt=2**63)


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

    @field_validator("metadata")
    @classmethod
    def _few(cls, metadata: dict[str, str]) -> dict[str, str]:
        if len(metadata) > 16 or any(not 0 < len(key) <= 64 for key in metadata):
            raise ValueError("at most 16 entries, with keys of 1 to 64 characters")
        if any("\0" in text for entry in metadata.items() for text in entry):
            raise ValueError("must not contain the NUL character")  # PostgreSQL does not store it
        return metadata

    def parameters(self) -> dict[str, Any]:
        return Parameters(**{name: getattr(self, name) for name in Parameters.model_fields}).model_dump(mode="json")


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


class JobError(BaseModel):
    code: str = Field(examples=["model_not_usable"])
    detail: str
    stage: Stage | None = None
    shard: int | None = None
    attempts: int | None = None


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
    parameters: Parameters
    metadata: dict[str, str]
    error: JobError | None
    created_at: datetime
    started_at: datetime | None
    cancel_requested_at: datetime | None
    finished_at: datetime | None


class EventOut(BaseModel):
    id: int
    type: str = Field(examples=["unit.claimed"])
    created_at: datetime
    data: dict[str, Any]


class EventPage(BaseModel):
    """Events oldest first; `after` = the last `last_id` continues, also while the job runs."""

    object: Literal["list"] = "list"
    data: list[EventOut]
    has_more: bool
    last_id: int | None
