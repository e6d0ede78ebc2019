"""The types of a plan: stages, units to do, and finished units."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Stage(StrEnum):
    """In the order of execution; a job goes through those that it needs."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSpec:
    """A unit to create: `spec` is what the compute process needs, `total` counts what its progress counts (samples)."""

    stage: Stage
    shard: int
    artifact_key: str
    spec: Mapping[str, Any]
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A finished unit."""

    artifact_key: str
    spec: Mapping[str, Any]
    result: Mapping[str, Any]


History = Mapping[Stage, Sequence[Done]]
"""The finished units of each stage, in the order of their shards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInputs:
    """What the stages know of a job: content and parameters, no tenant. Jobs with different `salt` share no artifact."""

    model: Mapping[str, Any]
    pool: str
    target: str
    budget: int
    parameters: Mapping[str, Any]
    salt: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
