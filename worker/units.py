"""Between the ledger and the stages: what a unit's child is told, and which units come next."""

from typing import Any

from sqlalchemy.orm import Session

from service.datasets.tables import Dataset
from service.jobs import ledger
from service.jobs.ledger import Claim, UnitSpec
from service.jobs.state import STAGE_GROUPS, Stage, group_of
from service.jobs.tables import JobUnit, SelectionJob
from worker.errors import ComputeDied, OutOfMemory
from worker.stages import plan
from worker.stages.plan import JobInputs

_OUT_OF_MEMORY = (ComputeDied.code, OutOfMemory.code)


def unit_message(session: Session, claim: Claim) -> dict[str, Any]:
    """What the compute child needs to do the unit. After a death by memory its batches are halved."""
    job = session.get_one(SelectionJob, claim.job_id)
    unit = session.get_one(JobUnit, claim.unit_id)
    ran_out = unit.error is not None and unit.error["code"] in _OUT_OF_MEMORY
    return {
        "stage": claim.stage,
        "artifact_key": claim.artifact_key,
        "spec": claim.spec,
        "job": job_inputs(session, job).as_dict(),
        "prepared": {} if claim.stage == Stage.PREPARE else prepared_result(session, job.id),
        "halvings": unit.failures if ran_out else 0,
    }


def job_inputs(session: Session, job: SelectionJob) -> JobInputs:
    return JobInputs(
        model=job.model,
        pool=session.get_one(Dataset, job.pool_id).fingerprint,
        target=session.get_one(Dataset, job.target_id).fingerprint,
        budget=job.budget,
        parameters=job.parameters,
    )


def prepared_result(session: Session, job_id: str) -> dict[str, Any]:
    """The result of the job's prepare stage, which every later stage is told."""
    result = ledger.unit_results(session, job_id, Stage.PREPARE)[0].result
    assert result is not None
    return result


def next_units(session: Session, job: SelectionJob, finished: Stage) -> list[UnitSpec]:
    """The units of the group of stages after the one whose last unit has finished."""
    inputs, prepared = job_inputs(session, job), prepared_result(session, job.id)
    following = STAGE_GROUPS[group_of(finished) + 1]
    if Stage.PROPAGATE in following:
        stages = (Stage.EMBED, Stage.LANDMARK_GRADIENTS, Stage.TARGET_GRADIENTS)
        keys = {stage: [u.artifact_key for u in ledger.unit_results(session, job.id, stage)] for stage in stages}
        return plan.propagate_units(inputs, prepared, keys)
    if Stage.SELECT in following:
        return plan.select_units(inputs, prepared, _only_key(session, job, Stage.PROPAGATE))
    if Stage.PUBLISH in following:
        return plan.publish_units(job.id, prepared, _only_key(session, job, Stage.SELECT))
    return plan.compute_units(inputs, prepared)


def _only_key(session: Session, job: SelectionJob, stage: Stage) -> str:
    return ledger.unit_results(session, job.id, stage)[0].artifact_key
