"""What a job will cost, stage by stage: operations, seconds, memory and bytes of artifacts; plain arithmetic (METHOD 3).

`plan` is called when a job is posted, with counts estimated from the datasets' bytes, and once more after tokenisation.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from service.plan import passes
from service.plan.compared_costs import ComparedCosts, compared
from service.plan.job_counts import JobCounts
from service.plan.landmark_count import landmark_count
from service.plan.operations import Shape
from service.plan.passes import Parameters
from service.plan.rates import Rates
from service.plan.refine_cap import cap_of_job
from service.plan.stage_costs import StageCost, StageCosts, stages_of
from service.plan.stages import Stage

FISHER_HARMS_FROM = 1.0
"""The learning rate at which `fisher` on plain inner products was measured to destroy the choice."""


def plan(
    shape: Shape | str, parameters: Parameters, counts: JobCounts, rates: Rates, already: Mapping[Stage, float]
) -> dict[str, Any]:
    """The stages that the job will go through, with what each costs, as JSON.

    Args:
        shape: of the model; or why it is unknown, and then there are no figures.
        parameters: as the job echoes them.
        already: the share of a stage's units whose artifacts are in the store.

    `operations`, `artifact_bytes` and `memory_bytes` (of the compute process, device and host together) are of the whole
    stage; `seconds` is what one worker still needs for it, null if no rate is known.
    """
    warnings = [] if rates.device else ["No worker has computed anything yet, so durations cannot be estimated."]
    stages: dict[Stage, StageCost | None]
    costs: ComparedCosts | None = None
    dtype = _dtype(parameters, counts, rates)
    try:
        if isinstance(shape, str):
            raise ValueError(shape)
        stages = dict(StageCosts(shape, parameters, counts, dtype, rates.token_budget).all())
        costs = compared(shape, parameters, counts, dtype, rates)
    except ValueError as error:
        warnings.append(f"Operations, memory and bytes are not known: {error}.")
        stages = dict.fromkeys(stages_of(parameters, counts))
    cap = cap_of_job(shape, parameters, counts)
    entries = [
        _entry(stage, cost, None if cost is None else rates.seconds(stage, cost, dtype), already.get(stage, 0.0))
        for stage, cost in stages.items()
    ]
    totals = _totals(entries)
    if rates.memory_bytes and (totals["memory_bytes"] or 0) > rates.memory_bytes:
        warnings.append(
            f"A stage needs about {totals['memory_bytes'] / 2**30:.1f} GiB; the most recent worker has"
            f" {rates.memory_bytes / 2**30:.1f} GiB. Lower max_length or landmarks.count, or use quantization."
        )
    return {
        "stages": entries,
        "totals": totals,
        "costs": None if costs is None else costs.model_dump(),
        "refine_cap": None if cap is None else cap.as_dict(),
        "candidates": _candidates(shape, parameters, counts),
        "note": None if costs is None or _caps(parameters, counts) else _note(parameters, totals["operations"], costs),
        "warnings": [
            *warnings,
            *_caps(parameters, counts),
            *_of_weights(parameters),
            *([cap.note] if cap is not None and cap.note is not None else []),
        ],
        "tokens": {"pool": round(counts.pool.tokens), "target": round(counts.target.tokens)},
        "estimated": counts.estimated,
        "device": rates.device,
    }


def planned_seconds(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What the stages of a plan take one worker, as JSON: {"total", "stages": {stage: seconds}}; null where that is not known,
    as the total is where one of them is not."""
    stages = {entry["stage"]: entry["seconds"] for entry in plan["stages"]}
    total = None if None in stages.values() else sum(stages.values())
    return {"total": total, "stages": stages}


def _candidates(shape: Shape | str, parameters: Parameters, counts: JobCounts) -> dict[str, Any] | None:
    """What `auto` compares, and the cap from which on `output` is one of it; None where nothing is compared."""
    if parameters["embedding"]["kind"] != "auto" or _caps(parameters, counts):
        return None
    output_from = passes.output_from(shape, parameters, counts)
    return {
        "kinds": list(passes.offered_kinds(shape, parameters, counts)),
        "output_from": None if output_from is None else math.ceil(1000 * output_from) / 1000,
    }


def _entry(stage: Stage, cost: StageCost | None, seconds: float | None, share: float) -> dict[str, Any]:
    return {
        "stage": stage.value,
        "operations": None if cost is None else float(round(cost.operations)),
        "seconds": None if seconds is None else round(seconds * (1 - share), 3),
        "artifact_bytes": None if cost is None else round(cost.artifact_bytes),
        "memory_bytes": None if cost is None else round(cost.memory_bytes),
        "already_there": round(share, 4),
    }


def _totals(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums of what is known, None where nothing is; of memory, the most that a stage needs."""

    def known(name: str) -> list[Any]:
        return [entry[name] for entry in entries if entry[name] is not None]

    totals = {name: sum(known(name)) if known(name) else None for name in ("operations", "seconds", "artifact_bytes")}
    return {**totals, "memory_bytes": max(known("memory_bytes"), default=None)}


def _note(parameters: Parameters, total: float, costs: ComparedCosts) -> str | None:
    exact = total - costs.job.operations + costs.exact_influence.operations
    if parameters["method"] != "influence_distillation" or exact >= 2 * total:
        return None
    return (
        f"method exact_influence would cost {exact / total:.1f} times the operations of this job, less than twice:"
        " consider it, since it approximates nothing."
    )


def _caps(parameters: Parameters, counts: JobCounts) -> list[str]:
    n, wanted = int(counts.selectable), parameters["landmarks"]["count"]
    if parameters["method"] != "influence_distillation" or landmark_count(parameters, n) < n:
        return []
    is_lowered = wanted is not None and wanted > n
    lowered = f"landmarks.count is {wanted}; lowered to the {n} usable samples of the pool. " if is_lowered else ""
    return [f"{lowered}Every sample is a landmark, so every influence is exact and no embedding is needed."]


def _of_weights(parameters: Parameters) -> list[str]:
    """What is known to harm the choice of `weighted` (docs/method.md, Select)."""
    if parameters["selection"] != "weighted" or parameters["gradient"]["normalize"] is not False:
        return []
    warnings = [
        "selection weighted on plain inner products favours samples with large gradients, which are those with short replies:"
        " where it was measured, it chose replies of two tokens from other sources than the target's."
        " gradient.normalize true, which needs curvature none, avoids that."
    ]
    if parameters["curvature"]["type"] == "fisher" and parameters["optimizer"]["learning_rate"] >= FISHER_HARMS_FROM:
        warnings.append(
            f"curvature fisher at a learning rate of {FISHER_HARMS_FROM:g} destroyed the choice where it was measured; lower"
            " optimizer.learning_rate, or use curvature none."
        )
    return warnings


def _dtype(parameters: Parameters, counts: JobCounts, rates: Rates) -> str:
    if counts.dtype is not None:
        return counts.dtype
    if parameters["dtype"] != "auto":
        return str(parameters["dtype"])
    return max(rates.matmul, key=lambda name: rates.matmul[name], default="float32")
