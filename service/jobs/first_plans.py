"""The first plan of each job, `job.planned`: written soon after the job, in which a submission need not wait for it.

A job without a plan says so (`awaits_plan`) until it has one: whichever process leads finds it. Its first unit waits for that,
but not for long (`ledger.claims`).
"""

import json
import logging
import time
from collections.abc import Iterable
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, aliased

from service import ledger
from service.datasets.tables import Dataset
from service.db.engine import Sessions
from service.jobs import planning
from service.ledger.state import JobStatus
from service.ledger.tables import SelectionJob
from service.plan.rates import Rates
from service.settings import ApiSettings
from service.storage.artifacts import ArtifactStore

log = logging.getLogger(__name__)

AT_ONCE = 100
_RATES_SECONDS = 10.0

_pool, _target = aliased(Dataset), aliased(Dataset)
_UNPLANNED = (
    select(SelectionJob, _pool, _target)
    .join(_pool, _pool.id == SelectionJob.pool_id)
    .join(_target, _target.id == SelectionJob.target_id)
    .where(SelectionJob.awaits_plan, SelectionJob.status.in_((JobStatus.QUEUED, JobStatus.RUNNING)))
    .order_by(SelectionJob.id)
    .limit(AT_ONCE)
)


class FirstPlans:
    """Plans what has no plan; the rates that workers have measured are those of a few seconds ago."""

    def __init__(self, sessions: Sessions, store: ArtifactStore, settings: ApiSettings) -> None:
        self._sessions, self._store, self._settings = sessions, store, settings
        self._rates: Rates | None = None
        self._rates_until = 0.0

    def write(self) -> int:
        """Plans the jobs without a plan, up to a hundred; equal ones are planned once. Returns how many have one now.
        Asks the store, and the hub for the shape of a model.

        A job that cannot be planned is left for the next time.
        """
        with self._sessions() as session:  # which a plan ends before it asks anyone
            found = session.execute(_UNPLANNED).all()
            plans = self._plans(session, found) if found else {}
        if not plans:
            return 0
        with self._sessions.begin() as session:
            return len(ledger.write_plans(session, plans))

    def _plans(
        self, session: Session, found: Iterable[tuple[SelectionJob, Dataset, Dataset]]
    ) -> dict[str, dict[str, Any]]:
        """By the id of the job."""
        of_content: dict[str, dict[str, Any] | None] = {}
        plans = {}
        for job, pool, target in found:
            content = _content(job, pool, target)
            if content not in of_content:
                of_content[content] = self._plan(session, job, pool, target)
            if (planned := of_content[content]) is not None:
                plans[job.id] = planned
        return plans

    def _plan(self, session: Session, job: SelectionJob, pool: Dataset, target: Dataset) -> dict[str, Any] | None:
        """None where it cannot be planned now."""
        if self._rates is None or time.monotonic() > self._rates_until:
            self._rates, self._rates_until = planning.measured_rates(session), time.monotonic() + _RATES_SECONDS
        try:
            return planning.plan(session, self._store, self._settings.models, job, pool, target, self._rates)
        except DBAPIError:
            raise
        except Exception:  # whatever the store's library raises
            log.exception("%s could not be planned", job.id)
            return None


def _content(job: SelectionJob, pool: Dataset, target: Dataset) -> str:
    """All that a plan depends on."""
    data = (pool.fingerprint, target.fingerprint)
    return json.dumps([job.tenant_id, *data, job.model, job.budget, job.parameters, job.reproduces is None])
