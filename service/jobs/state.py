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
    """In the order in which a job goes through them; the three in the middle of a group may run side by side."""

    PREPARE = "prepare"
    EMBED = "embed"
    LANDMARK_GRADIENTS = "landmark_gradients"
    TARGET_GRADIENTS = "target_gradients"
    PROPAGATE = "propagate"
    SELECT = "select"
    PUBLISH = "publish"


# A group's units are created together, once every unit of the group before has succeeded.
STAGE_GROUPS: tuple[tuple[Stage, ...], ...] = (
    (Stage.PREPARE,),
    (Stage.EMBED, Stage.LANDMARK_GRADIENTS, Stage.TARGET_GRADIENTS),
    (Stage.PROPAGATE,),
    (Stage.SELECT,),
    (Stage.PUBLISH,),
)
STAGE_ORDER: dict[Stage, int] = {stage: i for i, stage in enumerate(Stage)}

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


def group_of(stage: Stage) -> int:
    """The index in STAGE_GROUPS of the group that holds the stage."""
    return next(i for i, group in enumerate(STAGE_GROUPS) if stage in group)
