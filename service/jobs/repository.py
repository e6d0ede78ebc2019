"""SQL that reads jobs, scoped by tenant, and what workers have measured. What changes jobs is in ledger.py."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import BigInteger, Row, bindparam, cast, func, or_, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, aliased

from service import ids
from service.datasets.tables import Dataset
from service.jobs.state import JobStatus, UnitState
from service.jobs.tables import JobEvent, JobUnit, SelectionJob, Worker, WorkerProcess
from service.settings import LedgerSettings

_LOOKED_AT = 300  # jobs, for similar ones


def is_id(value: str) -> bool:
    return ids.is_id("job", value)


def get(session: Session, tenant_id: str, job_id: str, *, or_deleted: bool = False) -> SelectionJob | None:
    if not is_id(job_id):
        return None
    job = select(SelectionJob).where(SelectionJob.id == job_id, SelectionJob.tenant_id == tenant_id)
    return session.scalar(job if or_deleted else job.where(SelectionJob.deleted_at.is_(None)))


def page(
    session: Session, tenant_id: str, *, after: str | None, status: JobStatus | None, limit: int
) -> list[SelectionJob]:
    """At most `limit`, newest first, older than `after`."""
    jobs = select(SelectionJob).where(SelectionJob.tenant_id == tenant_id, SelectionJob.deleted_at.is_(None))
    if after is not None:
        jobs = jobs.where(SelectionJob.id < after)
    if status is not None:
        jobs = jobs.where(SelectionJob.status == status)
    return list(session.scalars(jobs.order_by(SelectionJob.id.desc()).limit(limit)))


# Made once: with every poll this takes as long as running it.
_STAGE_ROWS = (
    select(
        JobUnit.job_id,
        JobUnit.stage,
        func.count().label("units"),
        func.count().filter(JobUnit.state == UnitState.SUCCEEDED).label("units_done"),
        func.count().filter(JobUnit.result["reused"].as_boolean()).label("units_reused"),
        cast(func.sum(JobUnit.progress_done), BigInteger).label("done"),  # the sum of bigints is numeric
        cast(func.sum(JobUnit.progress_total), BigInteger).label("total"),
        func.min(JobUnit.started_at).label("started_at"),
        func.max(JobUnit.finished_at).label("finished_at"),
        func.clock_timestamp().label("now"),
    )
    .where(JobUnit.job_id.in_(bindparam("job_ids", expanding=True)))
    .group_by(JobUnit.job_id, JobUnit.stage)
    .order_by(JobUnit.job_id, JobUnit.stage)
)


def stage_rows(session: Session, job_ids: Sequence[str]) -> Sequence[Row[Any]]:
    """One row for each job and stage: counts, progress and times of its units."""
    return session.execute(_STAGE_ROWS, {"job_ids": job_ids}).all()


def events(session: Session, job_id: str, *, after: int, limit: int) -> list[JobEvent]:
    """Oldest first, one more than the limit where there are more."""
    return list(
        session.scalars(
            select(JobEvent)
            .where(JobEvent.job_id == job_id, JobEvent.id > after)
            .order_by(JobEvent.id)
            .limit(limit + 1)
        )
    )


def last_event(session: Session, job_id: str, kind: str) -> dict[str, Any] | None:
    """The data of the job's latest event of that kind."""
    events = select(JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.type == kind)
    return session.scalar(events.order_by(JobEvent.id.desc()).limit(1))


def similar_jobs(
    session: Session, tenant_id: str, *, model: Mapping[str, Any], pool: str, target: str, limit: int
) -> list[tuple[SelectionJob, str, str]]:
    """The tenant's newest succeeded jobs on the model and one of the contents, each with its pool's and target's fingerprint.

    Only among its last hundreds, so that a tenant with very many, none of them similar, does not have all looked at.
    """
    newest = (
        select(SelectionJob)
        .where(SelectionJob.tenant_id == tenant_id, SelectionJob.status == JobStatus.SUCCEEDED)
        .where(SelectionJob.deleted_at.is_(None))
        .order_by(SelectionJob.id.desc())
        .limit(_LOOKED_AT)
    ).subquery()
    job, pools, targets = aliased(SelectionJob, newest), aliased(Dataset), aliased(Dataset)
    found = session.execute(
        select(job, pools.fingerprint, targets.fingerprint)
        .join(pools, pools.id == job.pool_id)
        .join(targets, targets.id == job.target_id)
        .where(job.model == dict(model), or_(pools.fingerprint == pool, targets.fingerprint == target))
        .order_by(job.id.desc())
        .limit(limit)
    )
    return [(row[0], row[1], row[2]) for row in found]


_STAGE_RATES = text("""
    SELECT s.stage::text AS stage,
        sum((u.result ->> 'operations')::float8) FILTER (WHERE u.result ? 'operations')
            / nullif(sum((u.result ->> 'seconds')::float8) FILTER (WHERE u.result ? 'operations'), 0) AS operations,
        sum(u.progress_total) / nullif(sum(extract(epoch FROM u.finished_at - u.started_at)), 0)::float8 AS samples
    FROM unnest(enum_range(NULL::stage)) AS s (stage), LATERAL (
        SELECT * FROM job_units
        WHERE stage = s.stage AND state = 'succeeded' AND NOT coalesce((result ->> 'reused')::boolean, false)
        ORDER BY finished_at DESC LIMIT 200
    ) u
    GROUP BY s.stage
""")


def stage_rates(session: Session) -> Sequence[Row[Any]]:
    """(stage, operations, samples), both a second, over the newest 200 units of each stage that were really computed."""
    return session.execute(_STAGE_RATES).all()


_GAUGES = text("""
    WITH open_jobs AS (
        SELECT id, status FROM selection_jobs WHERE status IN ('queued', 'running', 'cancelling')
    ), open_units AS (
        SELECT u.stage, u.state, u.artifact_key, u.created_at, u.started_at, u.not_before, j.status
        FROM job_units u JOIN open_jobs j ON j.id = u.job_id
    ), claimable AS (
        SELECT extract(epoch FROM clock_timestamp() - greatest(created_at, started_at, not_before)) AS seconds
        FROM open_units u
        WHERE status <> 'cancelling' AND state = 'pending' AND (not_before IS NULL OR not_before <= clock_timestamp())
            AND NOT EXISTS (SELECT FROM job_units o WHERE o.artifact_key = u.artifact_key AND o.state = 'running')
    )
    SELECT 'jobs' AS gauge, status::text AS one, NULL AS two, count(*)::float8 AS value FROM open_jobs GROUP BY status
    UNION ALL SELECT 'units', stage::text, state::text, count(*) FROM open_units GROUP BY stage, state
    UNION ALL SELECT 'units_claimable', NULL, NULL, count(*) FROM claimable
    UNION ALL SELECT 'oldest_claimable_unit_seconds', NULL, NULL, coalesce(max(seconds), 0)::float8 FROM claimable
    UNION ALL SELECT 'leases_expired', NULL, NULL, count(*) FROM job_units
        WHERE state = 'running' AND lease_expires_at < clock_timestamp()
    UNION ALL SELECT 'workers_alive', NULL, NULL, count(*) FROM worker_processes
        WHERE stopped_at IS NULL AND seen_at > clock_timestamp() - make_interval(secs => :alive_seconds)
""")


def gauges(session: Session, *, alive_seconds: float, timeout_seconds: float) -> Sequence[Row[Any]]:
    """(gauge, one, two, value): what the metrics tell of open jobs (by status), their units (by stage and state) and workers.

    A worker that has not told of itself for `alive_seconds` is not counted. What is claimable is `claim_unit`'s matter.
    """
    session.execute(func.set_config("statement_timeout", f"{round(timeout_seconds * 1000)}ms", True).select())
    return session.execute(_GAUGES, {"alive_seconds": alive_seconds}).all()


def trace(session: Session, job_id: str) -> str | None:
    """The traceparent of the request that posted the job."""
    return session.scalar(select(SelectionJob.trace).where(SelectionJob.id == job_id))


def newest_worker(session: Session) -> Worker | None:
    return session.scalar(select(Worker).order_by(Worker.seen_at.desc()).limit(1))


def record_presence(session: Session, worker_id: str, version: str, *, stopped: bool) -> None:
    """Writes that the worker runs now, or that it has ended in good order."""
    now = func.clock_timestamp()
    seen = {"version": version, "seen_at": now, "stopped_at": now if stopped else None}
    written = insert(WorkerProcess).values(worker_id=worker_id, started_at=now, **seen)
    session.execute(written.on_conflict_do_update(index_elements=[WorkerProcess.worker_id], set_=seen))


def record_worker(
    session: Session, *, worker_id: str, device: str, memory_bytes: int, matmul_rates: Mapping[str, float]
) -> None:
    """Writes what a worker has measured of its machine; `matmul_rates` are operations a second by dtype."""
    measured = {
        "device": device,
        "memory_bytes": memory_bytes,
        "matmul_rates": dict(matmul_rates),
        "seen_at": func.clock_timestamp(),
    }
    written = insert(Worker).values(worker_id=worker_id, **measured)
    session.execute(written.on_conflict_do_update(index_elements=[Worker.worker_id], set_=measured))


_DIAGNOSIS = text("""
    WITH open_jobs AS (
        SELECT j.id, j.status, j.cancel_requested_at,
            greatest(j.created_at, (SELECT max(created_at) FROM job_events WHERE job_id = j.id)) AS moved_at
        FROM selection_jobs j WHERE j.status IN ('queued', 'running', 'cancelling')
    ), open_units AS (
        SELECT * FROM job_units WHERE state IN ('pending', 'running') AND job_id IN (SELECT id FROM open_jobs)
    ), counted AS (
        SELECT count(*) FILTER (WHERE state = 'pending') AS pending,
            count(*) FILTER (WHERE not_before > clock_timestamp()) AS delayed,
            count(*) FILTER (WHERE lease_expires_at >= clock_timestamp()) AS running,
            count(*) FILTER (WHERE lease_expires_at < clock_timestamp() - make_interval(secs => :sweeps)) AS expired
        FROM open_units
    )
    SELECT counted.*, (SELECT count(*) FROM open_jobs) AS open,
        (SELECT count(*) FROM open_jobs WHERE status = 'cancelling'
            AND cancel_requested_at < clock_timestamp() - make_interval(secs => :cancel)) AS overdue,
        ARRAY(SELECT id FROM open_jobs j
            WHERE status <> 'cancelling' AND moved_at < clock_timestamp() - make_interval(secs => :still)
                AND NOT EXISTS (SELECT FROM open_units WHERE job_id = j.id AND not_before > clock_timestamp())
                AND (running = 0 OR NOT EXISTS (SELECT FROM open_units WHERE job_id = j.id))
            ORDER BY id) AS still
    FROM counted
""")


def diagnosis(session: Session, ledger: LedgerSettings) -> Row[Any]:
    """One row on the open jobs and their units: open, pending, delayed, running (their lease holds), expired (three sweeps ago or
    more), overdue (cancels), still (ids).

    A job stands still where nothing has happened to it for ten leases and no unit runs that it could be waiting for, or none is
    left that could bring it on.
    """
    sweeps = 3 * ledger.sweep_seconds
    seconds = {"sweeps": sweeps, "cancel": ledger.cancel_seconds + sweeps, "still": 10 * ledger.lease_seconds}
    return session.execute(_DIAGNOSIS, seconds).one()


_RECENT_WORKERS = text("""
    SELECT worker_id, version, seen_at >= clock_timestamp() - make_interval(secs => :silent_seconds) AS is_alive
    FROM worker_processes
    WHERE stopped_at IS NULL AND seen_at > clock_timestamp() - greatest(interval '1 day', make_interval(secs => :silent_seconds))
    ORDER BY worker_id
""")


def recent_workers(session: Session, *, silent_seconds: float) -> Sequence[Row[Any]]:
    """(worker_id, version, is_alive) of those that have not said that they ended, and were alive within a day."""
    return session.execute(_RECENT_WORKERS, {"silent_seconds": silent_seconds}).all()
