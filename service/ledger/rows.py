"""What the ledger's modules share: claims and their fence, locks, events, and how units change state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from service.db.locks import Lock, advisory_lock
from service.ledger.state import JobStatus, UnitState
from service.ledger.tables import JobEvent, JobUnit, SelectionJob
from service.plan.stages import Stage, UnitSpec

OPEN = (JobStatus.QUEUED, JobStatus.RUNNING)  # what a unit may be claimed of
_RETRY_FACTOR = 6


class LeaseLost(Exception):
    """The unit is no longer this worker's: its lease expired, or the job ended. Nothing was written."""


class NotTerminal(Exception):
    """The job has not ended, so it cannot be deleted. Nothing was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """A unit is tried `max_attempts` times. After a failure it waits: `seconds` the first time, six times as long the next."""

    max_attempts: int
    seconds: float

    def delay(self, failures: int) -> float:
        return float(self.seconds * _RETRY_FACTOR ** (failures - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A unit under a lease. `attempt` goes with every write."""

    unit_id: int
    job_id: str
    attempt: int
    stage: Stage
    shard: int
    artifact_key: str
    spec: dict[str, Any]
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack:
    """What a worker cannot do: one job, the jobs of one model, or none at all. `problem` is a sentence for users."""

    problem: str
    model: Mapping[str, Any] | None = None
    job_id: str | None = None

    @property
    def is_all(self) -> bool:
        return self.model is None and self.job_id is None


@dataclass(frozen=True, slots=True)
class Beat:
    """What a heartbeat learned: whether the job is being cancelled."""

    cancelling: bool


def add_event(session: Session, job_id: str, kind: str, **data: Any) -> None:
    session.add(JobEvent(job_id=job_id, type=kind, data=data))


def create_units(session: Session, job_id: str, specs: Sequence[UnitSpec], code: str | None) -> None:
    # From here on retention sees what the units refer to: `lock_artifacts` waits for this transaction.
    advisory_lock(session, Lock.ARTIFACTS, shared=True)
    session.add_all(
        JobUnit(
            job_id=job_id,
            stage=spec.stage,
            shard=spec.shard,
            artifact_key=spec.artifact_key,
            code=code,
            spec=dict(spec.spec),
            state=UnitState.PENDING,
            progress_total=spec.total,
        )
        for spec in specs
    )
    session.flush()


def lock_claim(session: Session, claim: Claim) -> SelectionJob:
    """Locks the job and checks the fence: after this the transaction may write the unit's outcome.

    Raises:
        LeaseLost: the unit is no longer this worker's.
    """
    job = lock_job(session, claim.job_id)
    if session.scalar(select(JobUnit.id).where(*is_current_claim(claim)).with_for_update()) is None:
        raise LeaseLost
    return job


def lock_job(session: Session, job_id: str) -> SelectionJob:
    locked = select(SelectionJob).where(SelectionJob.id == job_id).with_for_update(key_share=True)
    return session.scalars(locked.execution_options(populate_existing=True)).one()


def lock_job_if_free(session: Session, job_id: str) -> SelectionJob | None:
    locked = select(SelectionJob).where(SelectionJob.id == job_id).with_for_update(key_share=True, skip_locked=True)
    return session.scalars(locked.execution_options(populate_existing=True)).one_or_none()


def is_current_claim(claim: Claim) -> tuple[Any, ...]:
    return (JobUnit.id == claim.unit_id, JobUnit.state == UnitState.RUNNING, JobUnit.attempt == claim.attempt)


def end_unit(session: Session, claim: Claim, state: UnitState, **values: Any) -> None:
    finished = None if state == UnitState.PENDING else func.clock_timestamp()
    changed = session.execute(
        update(JobUnit)
        .where(*is_current_claim(claim))
        .values(state=state, lease_expires_at=None, finished_at=finished, **values)
        .returning(JobUnit.id)
    ).one_or_none()
    if changed is None:
        raise LeaseLost


def cancel_units(session: Session, job_id: str, *states: UnitState, **why: str) -> None:
    stages = session.scalars(
        update(JobUnit)
        .where(JobUnit.job_id == job_id, JobUnit.state.in_(states))
        .values(state=UnitState.CANCELLED, lease_expires_at=None, finished_at=func.clock_timestamp())
        .returning(JobUnit.stage)
    ).all()
    if stages:
        add_event(
            session, job_id, "units.cancelled", stages=sorted({s.value for s in stages}), units=len(stages), **why
        )


def running_units(session: Session, job_id: str) -> int:
    running = select(func.count()).where(JobUnit.job_id == job_id, JobUnit.state == UnitState.RUNNING)
    return session.scalar(running) or 0


def claim_of(unit: JobUnit) -> Claim:
    return Claim(
        unit_id=unit.id,
        job_id=unit.job_id,
        attempt=unit.attempt,
        stage=unit.stage,
        shard=unit.shard,
        artifact_key=unit.artifact_key,
        spec=unit.spec,
        total=unit.progress_total,
    )


def unit_of(claim: Claim) -> dict[str, Any]:
    return {"stage": claim.stage.value, "shard": claim.shard}


def in_seconds(seconds: float) -> Any:
    return func.clock_timestamp() + timedelta(seconds=seconds)


def last_result(session: Session, job_id: str, stage: Stage) -> dict[str, Any] | None:
    """The result of the stage's last unit; None where it has none, or there is no unit."""
    units = select(JobUnit.result).where(JobUnit.job_id == job_id, JobUnit.stage == stage)
    return session.scalar(units.order_by(JobUnit.shard.desc()).limit(1))


def unit_results(session: Session, job_id: str, *stages: Stage) -> list[JobUnit]:
    """The job's units of the stages, in order of stage and shard."""
    units = select(JobUnit).where(JobUnit.job_id == job_id).order_by(JobUnit.stage, JobUnit.shard)
    if stages:
        units = units.where(JobUnit.stage.in_(stages))
    return list(session.scalars(units.execution_options(populate_existing=True)))
