"""Jobs that no live worker can do, since each lacks something: told at once, and ended after a while."""

from typing import Any

from sqlalchemy import Row, func, select, text
from sqlalchemy.orm import Session

from service.db.locks import try_advisory_lock
from service.ledger.claims import take
from service.ledger.outcomes import end_attempt
from service.ledger.rows import OPEN, Retries, add_event, lock_job_if_free, unit_of
from service.ledger.state import JobStatus, UnitState
from service.ledger.tables import JobEvent, JobUnit

CODE = "no_able_worker"
WAITING = "job.waiting"
_SWEEP = "the sweep"  # in the place of a worker: it claims the unit that it fails

_ANY_ABLE = text("""
    SELECT count(*) FILTER (WHERE lacks = '[]') > 0 OR count(*) = 0 FROM workers
    WHERE stopped_at IS NULL AND seen_at > clock_timestamp() - make_interval(secs => :lease_seconds)
""")
# A worker is able where nothing that it lacks is the job's; `seconds`: for how long no live worker has been able.
_UNDOABLE = text("""
    WITH live AS (
        SELECT worker_id, lacks, extract(epoch FROM clock_timestamp() - seen_at)::float8 AS silent FROM workers
        WHERE stopped_at IS NULL AND seen_at > clock_timestamp() - make_interval(secs => :lease_seconds)
    )
    SELECT j.id, array_agg(DISTINCT w.problem ORDER BY w.problem) AS problems,
        least(min(w.seconds), extract(epoch FROM clock_timestamp() - j.created_at)::float8) AS seconds
    FROM selection_jobs j CROSS JOIN live LEFT JOIN LATERAL (
        SELECT lack ->> 'problem' AS problem, (lack ->> 'seconds')::float8 + live.silent AS seconds
        FROM jsonb_array_elements(live.lacks) lack
        WHERE coalesce(lack -> 'model' = j.model, true) AND coalesce(lack ->> 'job_id' = j.id, true)
        ORDER BY 2 DESC LIMIT 1
    ) w ON true
    WHERE j.status IN ('queued', 'running')
        AND NOT EXISTS (SELECT FROM job_units u WHERE u.job_id = j.id AND u.state = 'running')
    GROUP BY j.id HAVING bool_and(w.problem IS NOT NULL)
    ORDER BY j.id
""")


def end_undoable(session: Session, *, lease_seconds: float, after_seconds: float) -> int:
    """Fails the jobs that no live worker has been able to do for so long; each other such job gets an event that says why it
    waits. Where no worker is alive, jobs wait. Returns how many failed.
    """
    if session.scalar(_ANY_ABLE, {"lease_seconds": lease_seconds}):
        return 0
    found = session.execute(_UNDOABLE, {"lease_seconds": lease_seconds}).all()
    return sum(_end(session, row, lease_seconds, after_seconds) for row in found)


def _end(session: Session, row: Row[Any], lease_seconds: float, after_seconds: float) -> bool:
    job = lock_job_if_free(session, row.id)
    if job is None or job.status not in OPEN:
        return False
    why = "No worker can do this job now. " + " ".join(row.problems)
    if row.seconds < after_seconds:
        last = select(JobEvent.type).where(JobEvent.job_id == job.id).order_by(JobEvent.id.desc()).limit(1)
        if session.scalar(last) != WAITING:
            add_event(session, job.id, WAITING, reason=why)
        return False
    unit = session.scalar(
        select(JobUnit)
        .where(JobUnit.job_id == job.id, JobUnit.state == UnitState.PENDING)
        .order_by(JobUnit.stage, JobUnit.shard)
        .with_for_update(skip_locked=True)
        .limit(1)
    )
    # As a claim does: a unit of the same artifact may be claimed just now.
    if unit is None or not try_advisory_lock(session, f"artifacts/{unit.artifact_key}"):
        return False
    claim = take(session, unit.id, _SWEEP, lease_seconds)
    if claim is None:
        return False
    if job.status == JobStatus.QUEUED:
        job.status, job.started_at = JobStatus.RUNNING, func.now()
        add_event(session, job.id, "job.running")
        session.flush()
    add_event(session, job.id, "unit.claimed", **unit_of(claim), attempt=claim.attempt, worker_id=_SWEEP)
    error = {"code": CODE, "detail": f"{why} Once its operator has corrected that, retry it."}
    end_attempt(session, job, claim, error, retryable=False, retries=Retries(max_attempts=1, seconds=0))
    return True
