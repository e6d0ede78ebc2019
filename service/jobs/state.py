"""The one table of job and unit transitions. PostgreSQL enforces the same table by trigger (a test compares them)."""

from enum import StrEnum


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class UnitState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Stage(StrEnum):
    """In the order in which a job goes through those that it needs (`worker.stages.plan` says which)."""

    PREPARE = "prepare"
    WARMUP = "warmup"
    LANDMARK_GRADIENTS = "landmark_gradients"
    TARGET_GRADIENTS = "target_gradients"
    CANDIDATES = "candidates"
    CHOOSE_EMBEDDING = "choose_embedding"
    CURVATURE = "curvature"
    EMBED = "embed"
    EMBED_TARGET = "embed_target"
    PROPAGATE = "propagate"
    REFINE = "refine"
    SELECT = "select"
    VALIDATE = "validate"
    PUBLISH = "publish"


JOB_TRANSITIONS: frozenset[tuple[JobStatus, JobStatus]] = frozenset(
    {
        (JobStatus.QUEUED, JobStatus.RUNNING),
        (JobStatus.QUEUED, JobStatus.CANCELLED),
        (JobStatus.RUNNING, JobStatus.CANCELLING),
        (JobStatus.RUNNING, JobStatus.CANCELLED),
        (JobStatus.RUNNING, JobStatus.SUCCEEDED),
        (JobStatus.RUNNING, JobStatus.FAILED),
        (JobStatus.CANCELLING, JobStatus.CANCELLED),
    }
)

UNIT_TRANSITIONS: frozenset[tuple[UnitState, UnitState]] = frozenset(
    {
        (UnitState.PENDING, UnitState.RUNNING),
        (UnitState.PENDING, UnitState.CANCELLED),
        (UnitState.RUNNING, UnitState.PENDING),
        (UnitState.RUNNING, UnitState.SUCCEEDED),
        (UnitState.RUNNING, UnitState.FAILED),
        (UnitState.RUNNING, UnitState.CANCELLED),
    }
)

TERMINAL: frozenset[JobStatus] = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})
