"""The first plan of each job, `job.planned`: written soon after the job, in which a submission need not wait for it.

A job without a plan says so (`awaits_plan`) until it has one: whichever process leads finds it. Its first unit waits for that,
but not for long (`ledger.claims`).
"""

import json
import logging
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import aliased

from service import ledger
from service.datasets.tables import Dataset
from service.db.engine import Sessions
from service.jobs import planning
from service.ledger.state import JobStatus
from service.ledger.tables import SelectionJob
from service.settings import ApiSettings
from service.storage.artifacts import ArtifactStore

log = logging.getLogger(__name__)

_AT_ONCE = 100

_pool, _target = aliased(Dataset), aliased(Dataset)
_UNPLANNED = (
    select(SelectionJob, _pool, _target)
    .join(_pool, _pool.id == SelectionJob.pool_id)
    .join(_target, _target.id == SelectionJob.target_id)
    .where(SelectionJob.awaits_plan, SelectionJob.status.in_((JobStatus.QUEUED, JobStatus.RUNNING)))
    .order_by(SelectionJob.id)
    .limit(_AT_ONCE)
)


def plan_new(sessions: Sessions, store: ArtifactStore, settings: ApiSettings) -> int:
    """Plans the jobs without a plan, up to a hundred; what some of them have in common is planned once. Returns how many have one
    now. Asks the store, and the hub for the shape of a model.

    A job that cannot be planned is left for the next time.
    """
    plans: dict[str, dict[str, Any]] = {}
    of_content: dict[str, dict[str, Any] | None] = {}
    with sessions() as session:  # which a plan ends before it asks anyone
        found = session.execute(_UNPLANNED).all()
        if not found:
            return 0
        rates = planning.measured_rates(session)
        for job, pool, target in found:
            content = _content(job, pool, target)
            if content not in of_content:
                try:
                    of_content[content] = planning.plan(session, store, settings.models, job, pool, target, rates)
                except DBAPIError:
                    raise
                except Exception:  # whatever the store's library raises
                    log.exception("%s could not be planned", job.id)
                    of_content[content] = None
            if (planned := of_content[content]) is not None:
                plans[job.id] = planned
    with sessions.begin() as session:
        return len(ledger.write_plans(session, plans))


def _content(job: SelectionJob, pool: Dataset, target: Dataset) -> str:
    """All that a plan depends on."""
    data = (pool.fingerprint, target.fingerprint)
    return json.dumps([job.tenant_id, *data, job.model, job.budget, job.parameters, job.reproduces is None])
