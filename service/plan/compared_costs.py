"""What a job costs beside other ways to choose from the same pool with the same model, by our count and by the paper's formula.

The formula (arXiv 2505.19051) counts all d weights of the model for each of the pool's T tokens: a forward pass is 2 d T, which
is `rds_plus`; gradients are three of them, so `exact_influence` is 6 d T, and l landmarks with r refined of n samples are
6 d T (l + r) / n; an embedding by the first b of B blocks is 2 d T b / B, its JVP twice that, `output` and `rds` 2 d T, `text`
nothing. Targets, candidates, projection, attention, output head, regression and choice are left out. Ours counts the products
that run (`operations.py`), of all that the job does for its choice. In both the warm-up is apart, and the validation is left out.
"""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from service.plan import passes
from service.plan.job_counts import JobCounts
from service.plan.operations import Shape
from service.plan.passes import Parameters
from service.plan.rates import Rates
from service.plan.refine_cap import refined_samples
from service.plan.stage_costs import StageCost, StageCosts
from service.plan.stages import Stage

APART = (Stage.PREPARE, Stage.WARMUP, Stage.VALIDATE)
"""What every way to choose needs or may have alike."""

_PLAIN: Parameters = {"selection": "round_robin", "curvature": {"type": "none"}, "min_fidelity": None}
_RIVALS: Mapping[str, Parameters] = {
    "rds_plus": {**_PLAIN, "method": "rds_plus"},
    "exact_influence": {"method": "exact_influence"},
    "authors": {
        **_PLAIN,
        "method": "influence_distillation",
        "landmarks": {"count": 4096, "choice": "uniform"},
        "embedding": {"kind": "jvp", "pooling": "last", "blocks": 4, "tangents": 2},
        "kernel": {"kind": "rbf", "ridge": 0.01, "bandwidth": None},
        "refine": {"size": 0, "share": None, "rounds": 1},
    },
}


class Cost(BaseModel):
    """What a choice costs, without the preparation of the data, the warm-up and the validation."""

    operations: float = Field(description="Floating-point operations of matrix products; a multiply-add is two")
    paper_operations: float = Field(
        description="By the formula of the method's paper: 2 d T for a forward pass through all d weights over all T tokens of"
        " the pool, three times that for gradients; without targets, projection, attention and output head (docs/method.md)"
    )
    seconds: float | None = Field(
        description="For one worker that finds nothing done, at the rates that workers have measured; null: of one of the stages"
        " there is none. In a result, of this job: the computing time of its units"
    )


class ComparedCosts(BaseModel):
    """What the job costs (in a plan, at most), beside other ways to choose from the same pool with the same model."""

    job: Cost
    rds_plus: Cost = Field(description="The same job with method `rds_plus`")
    exact_influence: Cost = Field(description="The same job with method `exact_influence`")
    authors: Cost = Field(
        description="The same job as the method's authors set it: 4,096 landmarks (or all of the pool), JVP of 4 blocks with 2"
        " tangents, last token, ridge 0.01, nothing refined"
    )
    warmup: Cost | None = Field(
        description="What the warm-up costs in addition, whatever the method; null: there is none"
    )
    rds_plus_ratio: float | None = Field(
        description="How many times the operations of this job `rds_plus` needs; null: this job needs none"
    )
    rds_plus_ratio_by_paper: float | None = Field(description="The same by the paper's formula")


def compared(
    shape: Shape, parameters: Parameters, counts: JobCounts, dtype: str, rates: Rates, *, job: Cost | None = None
) -> ComparedCosts:
    """
    Args:
        job: what the job has cost, where it is known; else what it will cost at most.

    Raises:
        ValueError: the layers that influence is measured on are not of this shape.
    """
    rivals = {
        name: cost_of(shape, {**parameters, **changed}, counts, dtype, rates) for name, changed in _RIVALS.items()
    }
    job = job or cost_of(shape, parameters, counts, dtype, rates)
    theirs = rivals["rds_plus"]
    return ComparedCosts(
        **rivals,
        job=job,
        warmup=None if parameters["warmup"] is None else _warmup(shape, parameters, counts, dtype, rates),
        rds_plus_ratio=_ratio(theirs.operations, job.operations),
        rds_plus_ratio_by_paper=_ratio(theirs.paper_operations, job.paper_operations),
    )


def cost_of(shape: Shape, parameters: Parameters, counts: JobCounts, dtype: str, rates: Rates) -> Cost:
    """Of a choice by these parameters.

    Raises:
        ValueError: as `compared`.
    """
    costs = StageCosts(shape, parameters, counts, dtype, rates.token_budget).all()
    chosen = {stage: cost for stage, cost in costs.items() if stage not in APART}
    return Cost(
        operations=float(round(math.fsum(cost.operations for cost in chosen.values()))),
        paper_operations=paper_operations(shape, parameters, counts),
        seconds=_seconds(chosen, rates),
    )


def paper_operations(shape: Shape, parameters: Parameters, counts: JobCounts) -> float:
    """By the formula of the paper, as the head of this module has it."""
    shape = passes.measured_shape(shape, parameters)
    forward: float = 2.0 * shape.weights * counts.pool.tokens
    landmarks = passes.landmarks_of(parameters, counts)
    match parameters["method"]:
        case "random":
            return 0.0
        case "rds_plus":
            return forward
        case "influence_distillation" if landmarks < counts.selectable:
            embedded = _forwards(shape, passes.pool_embedding(shape, parameters, counts))
            exact = landmarks + refined_samples(shape, parameters, counts)
            return float(round(forward * (embedded + 3 * exact / counts.selectable)))
    return 3 * forward


def _forwards(shape: Shape, options: Mapping[str, Any]) -> float:
    """How many forward passes through the whole model an embedding is in the paper's formula."""
    kind: str = options["kind"]
    part: float = min(options["blocks"] / shape.blocks, 1.0)
    return {"text": 0.0, "rds": 1.0, "output": 1.0, "jvp": 2 * part}.get(kind, part)


def _warmup(shape: Shape, parameters: Parameters, counts: JobCounts, dtype: str, rates: Rates) -> Cost:
    warmup = parameters["warmup"]
    cost = StageCosts(shape, parameters, counts, dtype, rates.token_budget).all()[Stage.WARMUP]
    passed = warmup["epochs"] * counts.drawn(min(warmup["samples"], counts.selectable)).tokens
    return Cost(
        operations=float(round(cost.operations)),
        paper_operations=float(round(6 * passes.measured_shape(shape, parameters).weights * passed)),
        seconds=_seconds({Stage.WARMUP: cost}, rates),
    )


def _seconds(costs: Mapping[Stage, StageCost], rates: Rates) -> float | None:
    known = [rates.measured_seconds(stage, cost) for stage, cost in costs.items()]
    return None if None in known else round(math.fsum(each for each in known if each is not None), 3)


def _ratio(theirs: float, ours: float) -> float | None:
    return round(theirs / ours, 3) if ours else None
