"""Jobs whose datasets are still being imported: they start when the last one is ready, and fail with an import that fails."""

import logging

from sqlalchemy import Select, exists, or_, select

from service import ledger
from service.auth.principal import Principal
from service.auth.tables import ApiKey
from service.datasets import imports
from service.datasets.tables import Dataset
from service.db.engine import Sessions
from service.http.errors import ApiError
from service.jobs import planning, quotas, repository
from service.jobs.service import budget_of
from service.ledger.state import JobStatus
from service.ledger.tables import SelectionJob
from service.plan.preparing import prepare_unit
from service.settings import ApiSettings
from service.storage.artifacts import ArtifactStore
from service.tasks import Task, TaskState

log = logging.getLogger(__name__)

_AT_ONCE = 100


def end_waiting(sessions: Sessions, store: ArtifactStore, settings: ApiSettings) -> int:
    """Starts or fails the jobs that need not wait any longer, up to a hundred. Returns how many. Asks the store, and the hub for
    the shape of a model."""
    with sessions() as session:
        found = session.scalars(_need_not_wait()).all()
    for job_id in found:
        try:
            _start(sessions, store, settings, job_id)
        except ApiError as error:
            log.info("%s does not start: %s", job_id, error.detail)
            with sessions.begin() as session:
                if ledger.fail_waiting(session, job_id, {"code": error.problem_code, "detail": error.detail}):
                    repository.add_samples_awaited(session, job_id)
    return len(found)


def _need_not_wait() -> Select[str]:
    """Jobs none of whose datasets is being imported: each is ready, or its import has failed."""
    being_imported = exists().where(
        or_(Dataset.id == SelectionJob.pool_id, Dataset.id == SelectionJob.target_id),
        Dataset.fingerprint.is_(None),
        exists().where(
            Task.subject == Dataset.id,
            Task.kind == imports.KIND,
            Task.state.in_((TaskState.PENDING, TaskState.RUNNING)),
        ),
    )
    return (
        select(SelectionJob.id)
        .where(SelectionJob.awaits_datasets, SelectionJob.status == JobStatus.QUEUED, ~being_imported)
        .order_by(SelectionJob.id)
        .limit(_AT_ONCE)
    )


def _start(sessions: Sessions, store: ArtifactStore, settings: ApiSettings, job_id: str) -> None:
    """
    Raises:
        ApiError: it cannot start: an import failed, its budget or a quota does not allow for the rows that there are.
    """
    with sessions() as session:  # which a plan ends before it asks anyone
        job = session.get_one(SelectionJob, job_id)
        pool, target = session.get_one(Dataset, job.pool_id), session.get_one(Dataset, job.target_id)
        imports.refuse_failed(session, pool=pool, target=target)
        key = session.get_one(ApiKey, job.key_id)
        session.expunge(job)
        budget = budget_of(job.request["budget"], pool)
        job.budget = budget
        planned = planning.plan(session, store, settings.models, job, pool, target)
    samples = pool.row_count + target.row_count
    with sessions.begin() as session:
        principal = Principal(tenant_id=job.tenant_id, key_id=key.id, limits=key.limits)
        if ledger.start_waiting(session, job_id, budget, [prepare_unit(job_id, samples)]):
            repository.add_samples_awaited(session, job_id)
            quotas.check_samples_of_started(session, principal, settings.limits, samples)
            ledger.add_plan(session, session.get_one(SelectionJob, job_id), planned)
