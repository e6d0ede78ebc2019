"""Between the ledger and the stages: what a unit's child is told, and which units come next."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from service.artifacts import ArtifactStore
from service.datasets.tables import Dataset
from service.jobs import cost, ledger, planning, repository
from service.jobs.ledger import Claim, UnitSpec
from service.jobs.stage_cost import JobCounts
from service.jobs.state import Stage
from service.jobs.tables import JobUnit, SelectionJob
from service.settings import ModelSettings
from worker.errors import ComputeDied, OutOfMemory
from worker.stages import plan
from worker.stages.keys import result_key
from worker.stages.plan import Done, JobInputs

_LOOKED_UP = 8  # units of a stage whose artifacts are asked for; in a remote store, each is a request
_COUNTED_BY_THE_PLAN = (Stage.WARMUP, Stage.CURVATURE, Stage.CHOOSE_EMBEDDING, Stage.VALIDATE)


def unit_message(session: Session, claim: Claim) -> dict[str, Any]:
    """What the compute child needs to do the unit. Where memory ran out its batches are halved.

    A child that was killed may have been killed by anyone: it is tried once more as it was, so that a kill changes no bit of
    what is computed, and is taken for out of memory from the second time on.
    """
    job = session.get_one(SelectionJob, claim.job_id)
    unit = session.get_one(JobUnit, claim.unit_id)
    code = "" if unit.error is None else unit.error["code"]
    halvings = {OutOfMemory.code: unit.failures, ComputeDied.code: unit.failures - 1}.get(code, 0)
    return {
        "stage": claim.stage,
        "artifact_key": claim.artifact_key,
        "spec": claim.spec,
        "job": job_inputs(session, job).as_dict(),
        "prepared": {} if claim.stage == Stage.PREPARE else prepared_result(session, job.id),
        "halvings": halvings,
    }


def job_inputs(session: Session, job: SelectionJob) -> JobInputs:
    return JobInputs(
        model=job.model,
        pool=session.get_one(Dataset, job.pool_id).fingerprint,
        target=session.get_one(Dataset, job.target_id).fingerprint,
        budget=job.budget,
        parameters=job.parameters,
        salt=job.id if job.reproduces else None,  # a reproduction finds nothing of any other job
    )


def prepared_result(session: Session, job_id: str) -> dict[str, Any]:
    """The result of the job's prepare stage, which every later stage is told."""
    result = ledger.unit_results(session, job_id, Stage.PREPARE)[0].result
    assert result is not None
    return result


def exact_plan(
    session: Session, store: ArtifactStore, settings: ModelSettings, job: SelectionJob, first: Sequence[UnitSpec]
) -> dict[str, Any]:
    """The plan and its cost again, now that tokens are counted and the names of the first wave's artifacts are known."""
    already = {}
    for stage in {unit.stage for unit in first}:
        keys = [unit.artifact_key for unit in first if unit.stage == stage]
        asked = keys[:: -(-len(keys) // _LOOKED_UP)]
        already[stage] = sum(store.exists(result_key(key)) for key in asked) / len(asked)
    counts = JobCounts.of_prepared(prepared_result(session, job.id), job.budget)
    shape = planning.shape_of(settings, job.model)
    return cost.plan(shape, job.parameters, counts, planning.measured_rates(session), already)


def with_operations(session: Session, claim: Claim, result: dict[str, Any]) -> dict[str, Any]:
    """The result with the stage's planned operations where it is one unit that did not count its own: rates are made of it."""
    if "operations" in result or claim.stage not in _COUNTED_BY_THE_PLAN:
        return result
    planned = repository.last_event(session, claim.job_id, "job.planned")
    stages = {entry["stage"]: entry["operations"] for entry in planned["stages"]} if planned else {}
    return {**result, "operations": stages.get(claim.stage)}


def next_units(session: Session, job: SelectionJob) -> list[UnitSpec]:
    """The units of the wave that follows, now that all of the job's are done."""
    done: dict[Stage, list[Done]] = {}
    for unit in ledger.unit_results(session, job.id):
        finished = Done(artifact_key=unit.artifact_key, spec=unit.spec, result=unit.result or {})
        done.setdefault(unit.stage, []).append(finished)
    units = plan.next_units(job_inputs(session, job), done)
    if units:
        return units
    return [plan.publish_unit(job.id, done[Stage.SELECT][0].artifact_key, done[Stage.PREPARE][0].result["n"])]
