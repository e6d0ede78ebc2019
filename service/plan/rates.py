"""How fast workers compute what a stage costs, as they have measured it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from service.plan.limits import default_token_budget
from service.plan.stage_costs import StageCost
from service.plan.stages import Stage

# Assumed share of a machine's matrix product rate until a unit of the stage has been measured.
RATE_SHARE = 0.4

_SAME_WORK = {
    Stage.TARGET_GRADIENTS: Stage.LANDMARK_GRADIENTS,
    Stage.REFINE: Stage.LANDMARK_GRADIENTS,
    Stage.CANDIDATES: Stage.EMBED,
    Stage.EMBED_TARGET: Stage.EMBED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What was measured: operations a second of each stage, samples a second of those without operations, and the newest
    worker's matrix products."""

    operations: Mapping[str, float] = field(default_factory=dict)
    samples: Mapping[str, float] = field(default_factory=dict)
    matmul: Mapping[str, float] = field(default_factory=dict)
    device: str | None = None
    memory_bytes: int | None = None

    @property
    def token_budget(self) -> int:
        """Tokens per batch on that worker; on an accelerator if none is known yet."""
        return default_token_budget("cpu" if (self.device or "").startswith("cpu") else "cuda")

    def measured_seconds(self, stage: Stage, cost: StageCost) -> float | None:
        """By the rate of the stage, or of one that does the same; None if no unit of either has been measured."""
        rates, amount = (self.operations, cost.operations) if cost.operations else (self.samples, cost.samples)
        rate = rates.get(stage, rates.get(_SAME_WORK.get(stage, stage)))
        return None if rate is None else amount / rate

    def seconds(self, stage: Stage, cost: StageCost, dtype: str) -> float | None:
        """The same; else by a share of the machine's rate; else by the samples of the stage. None if nothing is known."""
        found = self.measured_seconds(stage, cost)
        if found is None and cost.operations and dtype in self.matmul:
            return cost.operations / (RATE_SHARE * self.matmul[dtype])
        return found
