"""What a job has cost, by what its units have counted, beside other ways to choose (`service.plan.compared_costs`)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from service.plan.compared_costs import APART, Cost, compared, paper_operations
from service.plan.job_counts import JobCounts
from service.plan.operations import Shape
from service.plan.rates import Rates
from service.plan.stage_costs import StageCosts
from service.plan.stages import JobInputs, Stage
from worker.summary import Results


def of_job(
    shape: Shape | str, job: JobInputs, results: Results, found: Mapping[str, Any], rates: Rates
) -> dict[str, Any] | None:
    """`ComparedCosts` of a finished job as JSON; None where its model cannot be counted.

    Args:
        shape: of the model; or why it is unknown.
        results: of all units of the job; `found`: what `summary.of_method` makes of them.
        rates: for what the others would take.
    """
    prepared = next(result for result in reversed(results[Stage.PREPARE]) if result)
    counts, dtype = JobCounts.of_prepared(prepared, job.budget), prepared["dtype"]
    try:
        if isinstance(shape, str):
            return None
        spent = _spent(shape, job.parameters, counts, results, found)
        return compared(shape, job.parameters, counts, dtype, rates, job=spent).model_dump()
    except ValueError:  # the layers that influence was measured on are not of a shape that the plan knows
        return None


def _spent(
    shape: Shape, parameters: Mapping[str, Any], counts: JobCounts, results: Results, found: Mapping[str, Any]
) -> Cost:
    """By the units where they count their operations, and by the plan's arithmetic where they do not."""
    as_computed = {
        **parameters,
        "landmarks": {**parameters["landmarks"], "count": found["landmark_count"]},
        "refine": {**parameters["refine"], "share": None, "size": found["refined_count"] / counts.budget},
    }
    costs = StageCosts(shape, as_computed, counts, "float32", 1).all()  # of which only operations are used
    computed = {stage: units for stage, units in results.items() if units and stage not in APART}
    operations = [
        _operations(units, costs[stage].operations if stage in costs else 0.0) for stage, units in computed.items()
    ]
    seconds = [None if result is None else result.get("seconds") for units in computed.values() for result in units]
    as_chosen = {**as_computed, "embedding": {**parameters["embedding"], **(found["embedding"]["chosen"] or {})}}
    return Cost(
        operations=float(round(math.fsum(operations))),
        paper_operations=paper_operations(shape, as_chosen, counts),
        seconds=None if None in seconds else round(math.fsum(each for each in seconds if each is not None), 3),
    )


def _operations(units: Sequence[Mapping[str, Any] | None], planned: float) -> float:
    counted = [None if result is None else result.get("operations") for result in units]
    return planned if None in counted else math.fsum(each for each in counted if each is not None)
