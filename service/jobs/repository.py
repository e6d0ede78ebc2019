"""SQL that reads jobs, scoped by tenant, and figures on all of them. What changes jobs is in `service.ledger`."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import BigInteger, Row, Select, any_, bindparam, cast, func, or_, select, text
from sqlalchemy.orm import Session, aliased

from service.datasets.tables import Dataset
from service.db.pagination import paginate
from service.jobs.naming import narrow
from service.ledger.claims import PLAN_SECONDS
from service.ledger.state import JobStatus, UnitState
from service.ledger.tables import JobEvent, JobUnit, SelectionJob
from service.settings import LedgerSettings

_SEARCHED_JOBS = 300


def page(
    session: Session,
    tenant_id: str,
    *,
    after: str | None,
    status: JobStatus | None,
    name: str | None = None,
    labels: Sequence[str] = (),
    limit: int,
) -> tuple[list[SelectionJob], bool]:
    """Newest first. `name`: a part of it; `labels`: each `key:value`."""
    jobs = select(SelectionJob).where(SelectionJob.tenant_id == tenant_id, SelectionJob.deleted_at.is_(None))
    if status is not None:
        jobs = jobs.where(SelectionJob.status == status)
    jobs = narrow(jobs, tenant_id, name, labels)
    return paginate(session, jobs, SelectionJob.id, after=after, limit=limit)


# Built once: building it takes as long as running it.
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


def events(session: Session, job_id: str, *, after: int, limit: int) -> tuple[list[JobEvent], bool]:
    """Oldest first."""
    found = select(JobEvent).where(JobEvent.job_id == job_id)
    return paginate(session, found, JobEvent.id, after=after, limit=limit, ascending=True)


def last_event(session: Session, job_id: str, kind: str) -> dict[str, Any] | None:
    """The data of the job's latest event of that kind."""
    events = select(JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.type == kind)
    return session.scalar(events.order_by(JobEvent.id.desc()).limit(1))


def last_events(session: Session, job_ids: Sequence[str], kind: str) -> dict[str, dict[str, Any]]:
    """The data of each job's latest event of that kind, by job."""
    events = select(JobEvent.job_id, JobEvent.data).where(JobEvent.job_id.in_(job_ids), JobEvent.type == kind)
    return {row.job_id: row.data for row in session.execute(events.order_by(JobEvent.id))}


def newest_events(
    session: Session, job_id: str, *, before: int | None = None, limit: int
) -> tuple[list[JobEvent], bool]:
    """Newest first, of those before an event."""
    found = select(JobEvent).where(JobEvent.job_id == job_id)
    return paginate(session, found, JobEvent.id, after=before, limit=limit)


def events_of_kind(session: Session, job_id: str, kind: str, *, limit: int) -> list[dict[str, Any]]:
    """The data of the job's latest events of that kind, so many at most, oldest first."""
    events = select(JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.type == kind)
    return list(session.scalars(events.order_by(JobEvent.id.desc()).limit(limit)))[::-1]


def similar_jobs(
    session: Session, tenant_id: str, *, model: Mapping[str, Any], pool: str, target: str, limit: int
) -> list[tuple[SelectionJob, str, str]]:
    """The tenant's newest succeeded jobs on the model and one of the contents, each with its pool's and target's fingerprint.

    Only the latest few hundred are searched, which bounds the query for a tenant with very many.
    """
    wanted = {"tenant_id": tenant_id, "model": dict(model), "pool": pool, "target": target, "limit": limit}
    return [(row[0], row[1], row[2]) for row in session.execute(_similar_jobs(), wanted)]


@cache  # building it takes longer than running it
def _similar_jobs() -> Select[SelectionJob, str, str]:
    # Their ids alone, which are in the index, as an array: joined, they could be found by reading all newer jobs, too.
    newest = (
        select(SelectionJob.id)
        .where(SelectionJob.tenant_id == bindparam("tenant_id"), SelectionJob.status == JobStatus.SUCCEEDED)
        .where(SelectionJob.deleted_at.is_(None))
        .order_by(SelectionJob.id.desc())
        .limit(_SEARCHED_JOBS)
    ).scalar_subquery()
    pools, targets = aliased(Dataset), aliased(Dataset)
    is_similar = or_(pools.fingerprint == bindparam("pool"), targets.fingerprint == bindparam("target"))
    return (
        select(SelectionJob, pools.fingerprint, targets.fingerprint)
        .join(pools, pools.id == SelectionJob.pool_id)
        .join(targets, targets.id == SelectionJob.target_id)
        .where(SelectionJob.id == any_(func.array(newest)), SelectionJob.model == bindparam("model"), is_similar)
        .order_by(SelectionJob.id.desc())
        .limit(bindparam("limit", type_=BigInteger))
    )


_STAGE_RATES = text("""
    SELECT s.stage::text AS stage,
        sum(u.operations) FILTER (WHERE u.operations > 0)
            / nullif(sum((u.result ->> 'seconds')::float8) FILTER (WHERE u.operations > 0), 0) AS operations,
        sum(u.progress_total) FILTER (WHERE u.operations = 0)
            / nullif(sum(extract(epoch FROM u.finished_at - u.started_at)) FILTER (WHERE u.operations = 0), 0)::float8 AS samples
    FROM unnest(enum_range(NULL::stage)) AS s (stage), LATERAL (
        SELECT *, coalesce((result ->> 'operations')::float8, 0) AS operations FROM job_units
        WHERE stage = s.stage AND state = 'succeeded' AND NOT coalesce((result ->> 'reused')::boolean, false)
        ORDER BY finished_at DESC LIMIT 200
    ) u
    GROUP BY s.stage
""")


_USAGE = text("""
    SELECT open_jobs, samples - coalesce((
        SELECT samples_before FROM key_samples
        WHERE key_id = :key_id AND second > statement_timestamp() - interval '1 day 1 second' ORDER BY second LIMIT 1
    ), samples) AS samples FROM key_usage WHERE key_id = :key_id
""")


def usage(session: Session, key_id: str) -> tuple[int, int]:
    """The key's jobs that have not ended, and the samples of its jobs of the last 24 hours, however they ended."""
    found = session.execute(_USAGE, {"key_id": key_id}).one_or_none()
    return (0, 0) if found is None else (found.open_jobs, found.samples)


_LEAVE_AT = text("""
    SELECT second + interval '1 day 1 second' FROM (
        SELECT second FROM key_samples
        WHERE key_id = :key_id AND samples_before < (SELECT samples - :room FROM key_usage WHERE key_id = :key_id)
        ORDER BY samples_before DESC, second DESC LIMIT 1
    ) last WHERE second > statement_timestamp() - interval '1 day 1 second'
""")


def samples_leave_at(session: Session, key_id: str, room: int) -> datetime | None:
    """The time from which at most `room` of the samples of `usage` are within 24 hours; None if that is now."""
    found: datetime | None = session.scalar(_LEAVE_AT, {"key_id": key_id, "room": room})
    return found


_ADD_SAMPLES = text("""
    SELECT key_usage_add(j.key_id, 0, coalesce(sum(d.row_count), 0)::bigint)
    FROM job_events e JOIN selection_jobs j ON j.id = e.job_id
        CROSS JOIN jsonb_array_elements_text(e.data -> 'datasets') AS awaited (id)
        JOIN datasets d ON d.id = awaited.id
    WHERE e.job_id = :job_id AND e.type = 'job.waiting' AND e.data ? 'datasets' GROUP BY j.key_id
""")


def add_samples_awaited(session: Session, job_id: str) -> None:
    """Counts the samples that a job had to wait for, when it waits no longer; the others were counted when it was posted."""
    session.execute(_ADD_SAMPLES, {"job_id": job_id})


def delete_old_samples(session: Session) -> int:
    """Deletes what no quota is counted from any more, and returns how much."""
    return session.execute(text("DELETE FROM key_samples WHERE second < now() - interval '25 hours'")).rowcount  # type: ignore[attr-defined,no-any-return]


def stage_rates(session: Session) -> Sequence[Row[Any]]:
    """(stage, operations, samples), both a second, over the newest 200 units of each stage that were really computed: those with
    matrix products, and those without."""
    return session.execute(_STAGE_RATES).all()


_GAUGES = text("""
    WITH open_jobs AS (
        SELECT id, status, awaits_plan AND created_at > clock_timestamp() - make_interval(secs => :plan_seconds) AS is_unplanned
        FROM selection_jobs WHERE status IN ('queued', 'running', 'cancelling')
    ), open_units AS (
        SELECT u.stage, u.state, u.artifact_key, u.created_at, u.started_at, u.not_before, u.waits_for, j.status, j.is_unplanned
        FROM job_units u JOIN open_jobs j ON j.id = u.job_id
    ), claimable AS (
        SELECT extract(epoch FROM clock_timestamp() - greatest(created_at, started_at, not_before)) AS seconds
        FROM open_units u
        WHERE status <> 'cancelling' AND NOT is_unplanned AND state = 'pending'
            AND (not_before IS NULL OR not_before <= clock_timestamp())
            AND (waits_for IS NULL OR (SELECT m.state FROM job_units m WHERE m.id = u.waits_for) = 'succeeded')
            AND (SELECT true FROM job_units o WHERE o.artifact_key = u.artifact_key AND o.state = 'running') IS NULL
    )
    SELECT 'jobs' AS gauge, status::text AS one, NULL AS two, count(*)::float8 AS value FROM open_jobs GROUP BY status
    UNION ALL SELECT 'units', stage::text, state::text, count(*) FROM open_units GROUP BY stage, state
    UNION ALL SELECT 'units_claimable', NULL, NULL, count(*) FROM claimable
    UNION ALL SELECT 'oldest_claimable_unit_seconds', NULL, NULL, coalesce(max(seconds), 0)::float8 FROM claimable
    UNION ALL SELECT 'leases_expired', NULL, NULL, count(*) FROM job_units
        WHERE state = 'running' AND lease_expires_at < clock_timestamp()
    UNION ALL SELECT 'workers_alive', NULL, NULL, count(*) FROM workers
        WHERE stopped_at IS NULL AND seen_at > clock_timestamp() - make_interval(secs => :alive_seconds)
    UNION ALL SELECT 'workers_lacking', NULL, NULL, count(*) FROM workers
        WHERE stopped_at IS NULL AND seen_at > clock_timestamp() - make_interval(secs => :alive_seconds) AND lacks <> '[]'
""")


def gauges(session: Session, *, alive_seconds: float, timeout_seconds: float) -> Sequence[Row[Any]]:
    """(gauge, one, two, value) for the metrics: open jobs by status, their units by stage and state, and workers.

    A worker without a heartbeat for `alive_seconds` is not counted. `claim_unit` defines what is claimable.
    """
    session.execute(func.set_config("statement_timeout", f"{round(timeout_seconds * 1000)}ms", True).select())
    return session.execute(_GAUGES, {"alive_seconds": alive_seconds, "plan_seconds": PLAN_SECONDS}).all()


def trace(session: Session, job_id: str) -> str | None:
    """The traceparent of the request that posted the job."""
    return session.scalar(select(SelectionJob.trace).where(SelectionJob.id == job_id))


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

    A job is still if nothing has happened to it for ten leases, and no unit is running that it could be waiting for or it has
    no open unit left.
    """
    sweeps = 3 * ledger.sweep_seconds
    seconds = {"sweeps": sweeps, "cancel": ledger.cancel_seconds + sweeps, "still": 10 * ledger.lease_seconds}
    return session.execute(_DIAGNOSIS, seconds).one()
