"""Drafting, creating, describing, cancelling and deleting jobs."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

from fastapi import Response
from sqlalchemy import Row
from sqlalchemy.orm import Session

from service import ledger
from service.audit import service as audit
from service.auth.authentication import require_live
from service.auth.principal import Principal
from service.datasets import imports, preset_imports
from service.datasets import service as datasets
from service.datasets.preset_imports import PresetImport
from service.datasets.tables import Dataset
from service.db.engine import Sessions
from service.http.errors import Conflict, Unprocessable
from service.idempotency.service import IdempotentRequest, in_use
from service.ids import new_id
from service.jobs import naming, planning, quotas, repository, submission
from service.jobs.schemas import JobError, JobRequest, Progress, SelectionJobOut, SelectionPlan, StageReport
from service.jobs.submission import Known
from service.ledger.state import TERMINAL, JobStatus
from service.ledger.tables import SelectionJob
from service.models import registry
from service.observability.traces import traceparent
from service.plan.parameters import JobParameters
from service.plan.stages import Stage
from service.results import repository as results
from service.settings import ApiSettings, ModelSettings
from service.storage.artifacts import ArtifactStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A job that can be written: validated, its model resolved. `sample_count` is that of the datasets that are ready. Only a dry
    run has its plan."""

    job: SelectionJob
    sample_count: int
    plan: dict[str, Any] | None = None
    new_target: PresetImport | None = None
    """The import that begins with the job, where its target is none of the key's datasets yet."""


def draft(
    session: Session, principal: Principal, request: JobRequest, settings: ApiSettings, store: ArtifactStore
) -> Draft:
    """Validates and resolves a job, for a dry run plans it too, and writes nothing.

    Asks the hub and the store, and ends the session's transaction before each of them.

    Raises:
        Unprocessable: a field is not acceptable; `param` names it.
        Unavailable: the hub does not answer.
    """
    asked, preset = request.target, None
    if not isinstance(asked, str):
        session.close()  # no transaction is open while the hub is asked
        preset = preset_imports.resolve(**asked.model_dump(), settings=settings.datasets)
    pool = datasets.require(session, principal.tenant_id, request.pool, "pool")
    target, new_target = _target(session, principal, request, preset)
    awaited = _awaited(session, pool=pool, target=target)
    session.close()
    if awaited and request.dry_run:
        raise Conflict(
            f"A plan needs the rows of {' and '.join(awaited)}, whose import has not ended; ask again when it has.",
            code="dataset_not_ready",
        )
    job = _requested(principal, request, pool, target, settings, _budget(request.budget, pool))
    if awaited or (new_target is not None and not request.dry_run):
        return replace(waiting(job, pool, target, settings.models), new_target=new_target)
    drafted = ready(job, pool, target, settings.models)
    if not request.dry_run:
        return drafted
    return replace(drafted, plan=planning.plan(session, store, settings.models, job, pool, target))


def draft_on(principal: Principal, request: JobRequest, known: Known, settings: ApiSettings) -> Draft:
    """As `draft`, of a job on datasets that are known to be ready. Reads the model's files, or asks the hub for it."""
    budget = budget_of(request.budget, known.pool)
    job = _requested(principal, request, known.pool, known.target, settings, budget)
    job.created_at = known.now
    return ready(job, known.pool, known.target, settings.models)


def _requested(
    principal: Principal,
    request: JobRequest,
    pool: Dataset,
    target: Dataset,
    settings: ApiSettings,
    budget: int | None,
) -> SelectionJob:
    return new_job(
        principal,
        pool,
        target,
        **naming.columns(principal.tenant_id, request.name, request.labels),
        budget=budget,
        model=registry.resolve(settings.models, request.model, request),
        parameters=request.parameters(),
        request=request.model_dump(mode="json", exclude_unset=True, exclude={"name", "labels", "dry_run"}),
        job_metadata=request.metadata,
    )


def _target(
    session: Session, principal: Principal, request: JobRequest, preset: PresetImport | None
) -> tuple[Dataset, PresetImport | None]:
    """The target; or, of a preset that the key has not imported, what it may become, and its import."""
    if isinstance(request.target, str) or preset is None:
        return datasets.require(session, principal.tenant_id, str(request.target), "target"), None
    found = imports.find(session, principal, preset.source, preset.commit)
    if found is None or (request.dry_run and not found.is_ready):  # a plan waits for no import
        return preset.expected(), preset
    return found, None


def _awaited(session: Session, **named: Dataset) -> list[str]:
    """The ids of those that are being imported.

    Raises:
        Unprocessable: the import of one has failed; `param` names it.
    """
    imports.refuse_failed(session, **named)
    return list(dict.fromkeys(dataset.id for dataset in named.values() if not dataset.is_ready))


def new_job(principal: Principal, pool: Dataset, target: Dataset, **columns: Any) -> SelectionJob:
    """A queued job of the principal's key, not yet written."""
    owner = {"tenant_id": principal.tenant_id, "key_id": principal.key_id}
    data = {"pool_id": pool.id, "target_id": target.id}
    return SelectionJob(id=new_id("job"), status=JobStatus.QUEUED, **owner, **data, **columns)


def ready(job: SelectionJob, pool: Dataset, target: Dataset, settings: ModelSettings) -> Draft:
    """The draft of a job whose model is resolved and whose datasets are ready. Reads the model's files."""
    job.awaits_plan, job.model = True, registry.with_fingerprints(settings, job.model)
    return Draft(job=job, sample_count=pool.row_count + target.row_count)


def waiting(job: SelectionJob, pool: Dataset, target: Dataset, settings: ModelSettings) -> Draft:
    """The draft of a job whose model is resolved and which waits for the import of a dataset. Reads the model's files."""
    job.awaits_datasets, job.model = True, registry.with_fingerprints(settings, job.model)
    known = sum(dataset.row_count for dataset in (pool, target) if dataset.is_ready)
    return Draft(job=job, sample_count=known)


def import_target(session: Session, principal: Principal, draft: Draft, settings: ApiSettings) -> None:
    """Begins the import of the draft's new target, or finds one that has begun meanwhile.

    Raises:
        QuotaExceeded: the key may store nothing more.
    """
    assert draft.new_target is not None, "there is one"
    new = draft.new_target
    datasets.check_quota(session, principal, settings.limits, 1)
    draft.job.target_id = imports.find_or_create(session, principal, settings, new.source, new.commit, new.title).id
    audit.record(session, principal, "dataset.imported", draft.job.target_id, hub=new.source.id, commit=new.commit)


def to_write(
    principal: Principal,
    draft: Draft,
    settings: ApiSettings,
    idempotent: IdempotentRequest,
    response: Response,
    action: str,
    **detail: str,
) -> Mapping[str, Any]:
    """Everything that is written of a new job: with its first unit and `job.queued`, or without a unit and with `job.waiting`
    where it awaits an import; its audit entry; and its answer, the response. Every new job goes through here. Its plan follows
    (`first_plans`), and then the dispatcher is notified of the unit."""
    job = draft.job
    job.trace = traceparent()
    return submission.values_of(
        principal,
        settings.limits,
        job,
        draft.sample_count,
        action=action,
        detail=detail or {"pool": job.pool_id, "target": job.target_id},
        lock=idempotent.lock,
        kept=idempotent.sealed(response),
    )


def create(
    session: Session,
    principal: Principal,
    draft: Draft,
    settings: ApiSettings,
    idempotent: IdempotentRequest,
    values: Mapping[str, Any],
) -> None:
    """Writes what is `to_write`.

    Raises:
        Unprocessable: a dataset was deleted since the draft; `param` names it.
        QuotaExceeded: a quota of the key does not allow it now.
        Replayed: the request has been answered meanwhile; its answer.
        Conflict: a request with its idempotency key is running.
    """
    session.flush()
    while (refused := submission.write(session, values)) is not None:
        _refuse(session, principal, draft, settings, idempotent, refused)


def _refuse(
    session: Session,
    principal: Principal,
    draft: Draft,
    settings: ApiSettings,
    idempotent: IdempotentRequest,
    refused: str,
) -> None:
    """Raises what `create` raises; where the reason is gone by now, nothing."""
    if refused in ("key", "answered"):
        idempotent.replay(session)
        raise in_use()
    if refused in ("pool", "target"):
        datasets.require(session, principal.tenant_id, getattr(draft.job, f"{refused}_id"), refused)
    elif (error := quotas.refused(session, principal, settings.limits, refused, draft.sample_count)) is not None:
        raise error


def describe_plan(draft: Draft) -> SelectionPlan:
    """What the job would do and cost. Quotas are not checked: a plan uses none."""
    assert draft.plan is not None, "a dry run is drafted with a plan"
    job = draft.job
    chosen = {"model": job.model, "pool": job.pool_id, "target": job.target_id, "budget": job.budget}
    return SelectionPlan.model_validate({**chosen, "parameters": job.parameters, **draft.plan})


def _budget(budget: int | float, pool: Dataset) -> int | None:
    """As `budget_of`; None for a share of a pool that is being imported."""
    if pool.is_ready:
        return budget_of(budget, pool)
    return None if isinstance(budget, float) else budget


def budget_of(budget: int | float, pool: Dataset) -> int:
    """The number of samples to select of a pool that is ready.

    Raises:
        Unprocessable: the pool has fewer.
    """
    count = max(1, round(budget * pool.row_count)) if isinstance(budget, float) else budget
    if count > pool.row_count:
        raise Unprocessable(f"budget is {count}, but the pool has {pool.row_count} samples.", param="budget")
    return count


def cancel(session: Session, tenant_id: str, job_id: str) -> tuple[SelectionJob, bool]:
    """The job, and whether this call cancelled it: a job that has ended or is being cancelled is not changed."""
    job = ledger.require_job(session, tenant_id, job_id)
    cancelled = ledger.request_cancel(session, job)
    session.flush()
    session.refresh(job)
    return job, cancelled


def delete(session: Session, tenant_id: str, job_id: str) -> bool:
    """Deletes the job's results, units and events; its provenance stays. False if it was deleted before.

    Raises:
        NotFound: the tenant has no such job.
        Conflict: it has not ended.
    """
    job = ledger.require_job(session, tenant_id, job_id, or_deleted=True)
    try:
        deleted = ledger.delete_job(session, job)
    except ledger.NotTerminal as error:
        raise Conflict(
            f"Job {job_id} is {job.status}; cancel it first, or wait until it ends.",
            code="job_not_finished",
        ) from error
    results.delete(session, job_id)
    return deleted


def describe(session: Session, jobs: Sequence[SelectionJob]) -> list[SelectionJobOut]:
    """The jobs with their stages and progress, by one query for all of them."""
    rows: dict[str, list[Row[Any]]] = defaultdict(list)
    for row in repository.stage_rows(session, [job.id for job in jobs]):
        rows[row.job_id].append(row)
    return [describe_one(job, rows[job.id]) for job in jobs]


def describe_live(sessions: Sessions, principal: Principal, job_id: str) -> SelectionJobOut:
    """The job, for a request that has waited.

    Raises:
        Unauthorized: the key is not valid any more.
        NotFound: the tenant has no such job, or not any more.
    """
    with sessions() as session:
        require_live(session, principal)
        return describe(session, [ledger.require_job(session, principal.tenant_id, job_id)])[0]


def describe_new(draft: Draft) -> SelectionJobOut:
    """A job that is about to be written, as it will be read."""
    unit = SimpleNamespace(stage=Stage.PREPARE, units=1, units_done=0, units_reused=0, done=0, total=draft.sample_count)
    unit.started_at = unit.finished_at = None
    return describe_one(draft.job, [unit] if draft.job.awaits_plan else [])


def describe_one(job: Any, rows: Sequence[Any]) -> SelectionJobOut:
    """`job` has the columns of a `SelectionJob`, `rows` those of `repository.stage_rows`."""
    current = next((row for row in rows if row.units_done < row.units), None)
    if job.status in TERMINAL or job.status == JobStatus.QUEUED:
        current = None
    return SelectionJobOut(
        id=job.id,
        name=job.name,
        labels=job.labels,
        status=job.status,
        phase=None if current is None else current.stage,
        progress=None if current is None else _progress(current),
        stages=[_stage(row) for row in rows],
        model=job.model,
        pool=job.pool_id,
        target=job.target_id,
        budget=job.budget,
        parameters=cast(JobParameters, job.parameters),
        metadata=job.job_metadata,
        error=None if job.error is None else JobError.model_validate(job.error),
        retry_of=job.retry_of,
        reproduces=job.reproduces,
        created_at=job.created_at,
        started_at=job.started_at,
        cancel_requested_at=job.cancel_requested_at,
        finished_at=job.finished_at,
    )


def _progress(row: Any) -> Progress:
    seconds_left = None
    if row.started_at is not None and 0 < row.done < row.total:
        elapsed = (row.now - row.started_at).total_seconds()
        seconds_left = round(elapsed / row.done * (row.total - row.done), 1)
    return Progress(phase=row.stage, done=row.done, total=row.total, seconds_left=seconds_left)


def _stage(row: Any) -> StageReport:
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
