"""Planning, making, describing and cancelling jobs."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row
from sqlalchemy.orm import Session

from service import models
from service.artifacts import ArtifactStore
from service.datasets import service as datasets
from service.datasets.tables import Dataset
from service.errors import Conflict, NotFound, Unprocessable
from service.ids import new_id
from service.jobs import ledger, planning, repository
from service.jobs.parameters import JobParameters
from service.jobs.schemas import JobError, JobRequest, Progress, SelectionJobOut, SelectionPlan, StageReport
from service.jobs.state import TERMINAL, JobStatus, Stage
from service.jobs.tables import SelectionJob
from service.limits import quotas
from service.observability.traces import traceparent
from service.results import repository as results
from service.settings import LimitSettings, ModelSettings
from service.tenants.caller import Caller


def create(
    session: Session,
    caller: Caller,
    request: JobRequest,
    settings: ModelSettings,
    limits: LimitSettings,
    store: ArtifactStore,
) -> SelectionJob:
    """Writes the job, its first unit, and its first events: `job.queued` and, with its plan, `job.planned`. Never touches
    the broker: the dispatcher hears of the unit.

    Raises:
        Unprocessable: names the field that cannot be honoured.
        TooManyRequests: a quota of the key does not allow it now.
    """
    job, pool, target = _make(session, caller, request, settings)
    return start(session, caller, job, pool, target, settings, limits, store)


def start(
    session: Session,
    caller: Caller,
    job: SelectionJob,
    pool: Dataset,
    target: Dataset,
    settings: ModelSettings,
    limits: LimitSettings,
    store: ArtifactStore,
) -> SelectionJob:
    """Writes a job that has been made, as `create` does: every new job goes through here.

    Raises:
        TooManyRequests: a quota of the caller's key does not allow it now.
    """
    job.trace = traceparent()
    planned = planning.plan(session, store, settings, job, pool, target)
    quotas.check_job(session, caller, limits, pool.row_count + target.row_count)
    prepare = ledger.UnitSpec(
        stage=Stage.PREPARE,
        shard=0,
        artifact_key=f"prepare/{job.id}",
        spec={},
        total=pool.row_count + target.row_count,
    )
    ledger.create_job(session, job, [prepare])
    ledger.add_event(session, job.id, "job.planned", **planned)
    session.flush()
    session.refresh(job)
    return job


def plan(
    session: Session, caller: Caller, request: JobRequest, settings: ModelSettings, store: ArtifactStore
) -> SelectionPlan:
    """What the job would cost. Writes nothing; refuses what `create` refuses, but for quotas: a plan uses none."""
    job, pool, target = _make(session, caller, request, settings)
    planned = planning.plan(session, store, settings, job, pool, target)
    asked = {"model": job.model, "pool": pool.id, "target": target.id, "budget": job.budget}
    return SelectionPlan.model_validate({**asked, "parameters": job.parameters, **planned})


def _make(
    session: Session, caller: Caller, request: JobRequest, settings: ModelSettings
) -> tuple[SelectionJob, Dataset, Dataset]:
    """The job, not yet written, and its pool and target."""
    pool = datasets.require(session, caller.tenant_id, request.pool, "pool")
    target = datasets.require(session, caller.tenant_id, request.target, "target")
    budget = _budget(request.budget, pool.row_count)
    job = SelectionJob(
        id=new_id("job"),
        tenant_id=caller.tenant_id,
        key_id=caller.key_id,
        status=JobStatus.QUEUED,
        pool_id=pool.id,
        target_id=target.id,
        model=models.resolve(settings, request.model, request),
        budget=budget,
        parameters=request.parameters(),
        request=request.model_dump(mode="json", exclude_unset=True, exclude={"dry_run"}),
        job_metadata=request.metadata,
    )
    return job, pool, target


def _budget(budget: int | float, row_count: int) -> int:
    count = max(1, round(budget * row_count)) if isinstance(budget, float) else budget
    if count > row_count:
        raise Unprocessable(f"budget is {count}, but the pool has {row_count} samples.", param="budget")
    return count


def require(session: Session, tenant_id: str, job_id: str) -> SelectionJob:
    """The tenant's job.

    Raises:
        NotFound: there is none by this id, or it is another tenant's.
    """
    job = repository.get(session, tenant_id, job_id)
    if job is None:
        raise NotFound(f"No selection job {job_id!r}.", param="id")
    return job


def page(
    session: Session, tenant_id: str, *, after: str | None, status: JobStatus | None, limit: int
) -> tuple[list[SelectionJob], bool]:
    """A page of the tenant's jobs, newest first, and whether there are more."""
    found = repository.page(session, tenant_id, after=after, status=status, limit=limit + 1)
    return found[:limit], len(found) > limit


def cancel(session: Session, tenant_id: str, job_id: str) -> tuple[SelectionJob, bool]:
    """The job, and whether this has cancelled it: repeating, or a job that has ended, changes nothing."""
    job = require(session, tenant_id, job_id)
    asked = ledger.request_cancel(session, job)
    session.flush()
    session.refresh(job)
    return job, asked


def delete(session: Session, tenant_id: str, job_id: str) -> bool:
    """Deletes the job's results, units and events; its provenance stays. True; False where that was done before.

    Raises:
        NotFound: the tenant has no such job.
        Conflict: it has not ended.
    """
    job = repository.get(session, tenant_id, job_id, or_deleted=True)
    if job is None:
        raise NotFound(f"No selection job {job_id!r}.", param="id")
    try:
        deleted = ledger.delete_job(session, job)
    except ledger.NotTerminal as error:
        raise Conflict(
            f"Job {job_id} is {job.status}; cancel it first, or wait for its end.",
            code="job_not_finished",
        ) from error
    results.delete(session, job_id)
    return deleted


def describe(session: Session, jobs: Sequence[SelectionJob]) -> list[SelectionJobOut]:
    """The jobs with their stages and progress, by one query for all of them."""
    rows: dict[str, list[Row[Any]]] = defaultdict(list)
    for row in repository.stage_rows(session, [job.id for job in jobs]):
        rows[row.job_id].append(row)
    return [_describe(job, rows[job.id]) for job in jobs]


def _describe(job: SelectionJob, rows: Sequence[Row[Any]]) -> SelectionJobOut:
    current = next((row for row in rows if row.units_done < row.units), None)
    if job.status in TERMINAL or job.status == JobStatus.QUEUED:
        current = None
    return SelectionJobOut(
        id=job.id,
        status=job.status,
        phase=None if current is None else current.stage,
        progress=None if current is None else _progress(current),
        stages=[_stage(row) for row in rows],
        model=job.model,
        pool=job.pool_id,
        target=job.target_id,
        budget=job.budget,
        parameters=JobParameters.model_validate(job.parameters),
        metadata=job.job_metadata,
        error=None if job.error is None else JobError.model_validate(job.error),
        retry_of=job.retry_of,
        reproduces=job.reproduces,
        created_at=job.created_at,
        started_at=job.started_at,
        cancel_requested_at=job.cancel_requested_at,
        finished_at=job.finished_at,
    )


def _progress(row: Row[Any]) -> Progress:
    seconds_left = None
    if row.started_at is not None and 0 < row.done < row.total:
        elapsed = (row.now - row.started_at).total_seconds()
        seconds_left = round(elapsed / row.done * (row.total - row.done), 1)
    return Progress(phase=row.stage, done=row.done, total=row.total, seconds_left=seconds_left)


def _stage(row: Row[Any]) -> StageReport:
    is_done = row.units_done == row.units
    seconds = (row.finished_at - row.started_at).total_seconds() if is_done else None
    return StageReport(
        stage=row.stage,
        units=row.units,
        units_done=row.units_done,
        units_reused=row.units_reused,
        done=row.done,
        total=row.total,
        started_at=row.started_at,
        finished_at=row.finished_at if is_done else None,
        seconds=seconds,
    )
