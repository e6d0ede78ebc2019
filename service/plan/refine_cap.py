"""How many samples a job may refine: as its parameters say, or for a share of what `rds_plus` would cost."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from service.plan import passes
from service.plan.job_counts import JobCounts
from service.plan.limits import LEAST_REFINE, UNKNOWN_COST_REFINE
from service.plan.operations import Shape
from service.plan.passes import Parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineCap:
    """The most samples that `refine` with size `auto` computes; operations are those of matrix products.

    `allowed_operations`: for the whole choice, `max_cost` times those of `rds_plus`. `fixed_operations`: of them, what is spent
    before anything is refined. `is_floor`: less than `LEAST_REFINE` budgets are left for it, and these are refined all the same.
    Where the cost cannot be counted, the three figures are None and `unknown` says why.
    """

    samples: int
    times_budget: float
    allowed_operations: float | None
    fixed_operations: float | None
    operations_per_sample: float | None
    is_floor: bool
    unknown: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    @property
    def note(self) -> str | None:
        """Where the number of samples does not follow from `max_cost`, why."""
        if self.unknown is not None:
            return (
                f"refine.max_cost does not apply, because the operations of this model cannot be counted ({self.unknown});"
                f" at most {self.times_budget:.2g} times the budget are refined."
            )
        if not self.is_floor:
            return None
        return (
            f"refine.max_cost leaves less than {LEAST_REFINE:g} times the budget to refine; up to {self.samples} samples"
            " are refined all the same, since a shorter list loses much of the best selection. A refine.size limits them."
        )


def refine_cap(
    shape: Shape | str, parameters: Parameters, counts: JobCounts, embedding: Mapping[str, Any] | None = None
) -> RefineCap:
    """Of a job of method `influence_distillation` with `refine: {max_cost}`.

    Landmark and target gradients, the embeddings of the pool and those of the candidates count against the cap. The warm-up,
    the curvature and the validation do not: `rds_plus` has or needs them as well, or they serve another purpose than the choice.

    Args:
        shape: of the model; or why it is unknown, and then there is no cost: `UNKNOWN_COST_REFINE` times the budget.
        embedding: of the candidates of `auto` the one that was chosen; None: that which costs most.
    """
    landmarks = passes.landmarks_of(parameters, counts)
    available = max(math.floor(counts.selectable - landmarks), 0)
    try:
        if isinstance(shape, str):
            raise ValueError(shape)
        shape = passes.measured_shape(shape, parameters)
        each = passes.gradients(shape, parameters, counts.drawn(1), is_scaled=True)
        is_auto = parameters["embedding"]["kind"] == "auto"
        compared = passes.offered_embeddings(shape, parameters, counts) if is_auto else []
        embedding = embedding or passes.pool_embedding(shape, parameters, counts)
        fixed = passes.before_refining(shape, parameters, counts, embedding, compared)
        allowed = parameters["refine"]["max_cost"] * passes.rds_plus(shape, parameters, counts)
    except ValueError as error:
        return _cap(_times(UNKNOWN_COST_REFINE, counts.budget), available, counts.budget, unknown=str(error))
    affordable = max(math.floor((allowed - fixed) / each), 0)
    return _cap(affordable, available, counts.budget, allowed=allowed, fixed=fixed, each=each)


def _cap(
    affordable: int,
    available: int,
    budget: int,
    *,
    allowed: float | None = None,
    fixed: float | None = None,
    each: float | None = None,
    unknown: str | None = None,
) -> RefineCap:
    samples = min(max(affordable, _times(LEAST_REFINE, budget)), available)
    return RefineCap(
        samples=samples,
        times_budget=samples / budget,
        allowed_operations=allowed,
        fixed_operations=fixed,
        operations_per_sample=each,
        is_floor=affordable < samples,
        unknown=unknown,
    )


def cap_of_job(shape: Shape | str, parameters: Parameters, counts: JobCounts) -> RefineCap | None:
    """What `max_cost` allows the job to refine; None where it refines as many as it says, or approximates nothing."""
    is_exact = (
        parameters["method"] != "influence_distillation" or passes.landmarks_of(parameters, counts) >= counts.selectable
    )
    return None if is_exact or not passes.is_capped(parameters["refine"]) else refine_cap(shape, parameters, counts)


def refined_samples(
    shape: Shape | str, parameters: Parameters, counts: JobCounts, embedding: Mapping[str, Any] | None = None
) -> int:
    """How many samples the job refines at most; `embedding` as in `refine_cap`."""
    refine, landmarks = parameters["refine"], passes.landmarks_of(parameters, counts)
    cap = refine_cap(shape, parameters, counts, embedding).samples if passes.is_capped(refine) else 0
    usable = math.floor(counts.selectable)
    return shortlist_size(refine, budget=counts.budget, usable=usable, landmarks=math.ceil(landmarks), cap=cap)


def shortlist_size(refine: Mapping[str, Any], *, budget: int, usable: int, landmarks: int, cap: int) -> int:
    """How many samples are refined at most: the pool has `usable` ones, of which `landmarks` are exact already.

    Args:
        refine: {size, share, ...}; a share of the pool goes before a size in budgets.
        cap: `RefineCap.samples`, for the size `auto`.
    """
    if refine["share"] is not None:
        wanted = max(_times(refine["share"], usable), budget)
    elif refine["size"] == "auto":
        wanted = cap
    else:
        wanted = _times(refine["size"], budget)
    return max(min(wanted, usable - landmarks), 0)


def _times(factor: float, count: int) -> int:
    """The product rounded up; not for the last bit of a factor like 0.07."""
    return math.ceil(round(factor * count, 6))
