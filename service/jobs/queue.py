"""The place of a waiting job in the queue, and when it may start: computed when it is asked for, from the ledger as it is then.

Workers give tenants that wait equal shares, and within a tenant take the oldest job first (`ledger.claim_unit`). So while the
tenant's own work before the job is done, each other tenant gets as much done, if it has as much; one that is scheduled before
it gets a turn more. What jobs take is what their plans say, less what is done.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, Field
from sqlalchemy import text
from sqlalchemy.orm import Session

from service.ledger.state import JobStatus
from service.ledger.tables import SelectionJob
from service.settings import LedgerSettings


class NoEstimate(StrEnum):
    NOT_QUEUED = "not_queued"
    IMPORTING = "importing"
    NO_WORKER = "no_worker"
    NO_RATE = "no_rate"
    LONG_QUEUE = "long_queue"


class QueuePlace(BaseModel):
    """Where a job is in the queue, as of `as_of`. Nothing of it is a promise: others may post jobs, workers come and go."""

    object: Literal["queue_place"] = "queue_place"
    job_id: str = Field(examples=["job_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    status: JobStatus
    own_jobs_before: int | None = Field(
        description="Your tenant's queued jobs that workers take before it; null: it is not in the queue", examples=[2]
    )
    jobs_before: int | None = Field(
        description="Queued jobs, of all tenants, that are expected to start before it; null: not known", examples=[3]
    )
    workers: int = Field(description="Live workers that can do it", examples=[4])
    starts_at: datetime | None = Field(description="When its first unit may start, estimated; null: not known")
    no_estimate: NoEstimate | None = Field(
        description="Why `starts_at` is null: the job is not queued; a dataset of it is being imported; no live worker can do it;"
        " how long something before it takes is not known yet; more than 10,000 jobs have not ended"
    )
    as_of: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What an estimate is made from; seconds are of one worker, None where they are not known.

    `own_seconds`: what is left of the tenant's work before the job; `other_seconds`: what the other tenants get done meanwhile.
    `free_seconds`: until the first worker is free, where none is `idle`; `artifact_seconds`: until another unit has made what the
    job's first unit would make, 0 if none is at that.
    """

    jobs_before: int | None
    workers: int
    idle: int
    own_seconds: float | None
    other_seconds: float | None
    free_seconds: float | None
    artifact_seconds: float | None


def seconds_until_start(figures: Figures) -> float | None:
    """The seconds until the job may start; None where that is not known."""
    seconds: tuple[float | None, ...]
    if figures.jobs_before is not None and figures.idle > figures.jobs_before:
        seconds = (0.0, figures.artifact_seconds)
    elif not figures.workers or figures.own_seconds is None or figures.other_seconds is None:
        return None
    else:
        work = (figures.own_seconds + figures.other_seconds) / figures.workers
        seconds = (work, 0.0 if figures.idle > 0 else figures.free_seconds, figures.artifact_seconds)
    known = [each for each in seconds if each is not None]
    return max(known) if len(known) == len(seconds) else None


_LIVE = """
    WITH me AS (
        SELECT id, tenant_id, created_at, model FROM selection_jobs WHERE id = :job
    ), live AS (
        SELECT worker_id, NOT EXISTS (
            SELECT FROM jsonb_array_elements(lacks) lack
            WHERE coalesce(lack -> 'model' = me.model, true) AND coalesce(lack ->> 'job_id' = me.id, true)
        ) AS is_able FROM workers CROSS JOIN me
        WHERE stopped_at IS NULL AND seen_at > clock_timestamp() - make_interval(secs => :lease_seconds)
    )
"""
_FIGURES = text(f"""
    {_LIVE}, running AS (
        SELECT j.tenant_id, u.worker_id, u.artifact_key, CASE
            WHEN u.progress_done > 0 THEN
                extract(epoch FROM clock_timestamp() - u.started_at) / u.progress_done * (u.progress_total - u.progress_done)
            ELSE greatest(0, (j.planned_seconds -> 'stages' ->> u.stage::text)::float8 * u.progress_total / nullif((
                SELECT sum(progress_total) FROM job_units WHERE job_id = u.job_id AND stage = u.stage
            ), 0) - extract(epoch FROM clock_timestamp() - u.started_at))
        END::float8 AS seconds
        FROM job_units u JOIN selection_jobs j ON j.id = u.job_id WHERE u.state = 'running'
    ), busy AS (
        SELECT worker_id FROM running UNION ALL SELECT worker_id FROM tasks WHERE state = 'running' AND worker_id IS NOT NULL
    ), open_jobs AS (
        SELECT tenant_id, created_at, id, true AS is_queued, (planned_seconds ->> 'total')::float8 AS seconds
        FROM selection_jobs WHERE status = 'queued' AND NOT awaits_datasets
        UNION ALL SELECT tenant_id, created_at, j.id, false, (
            SELECT CASE WHEN bool_or(left_of_it > 0 AND planned.seconds IS NULL) THEN NULL
                ELSE coalesce(sum(left_of_it * coalesce(planned.seconds, 0)), 0) END
            FROM (
                SELECT value::float8 AS seconds, coalesce((
                    SELECT 1 - sum(progress_done)::float8 / nullif(sum(progress_total), 0)
                    FROM job_units WHERE job_id = j.id AND stage = key::stage
                ), 1) AS left_of_it FROM jsonb_each_text(j.planned_seconds -> 'stages')
            ) planned HAVING count(*) > 0
        ) FROM selection_jobs j WHERE status = 'running'
    ), queue AS (
        SELECT *, coalesce(sum(seconds) OVER before, 0) AS ahead,
            coalesce(bool_or(seconds IS NULL) OVER before, false) AS is_vague,
            coalesce(sum(is_queued::integer) OVER before, 0) AS queued_before
        FROM open_jobs
        WINDOW before AS (PARTITION BY tenant_id ORDER BY created_at, id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
    ), mine AS (
        SELECT q.ahead, q.is_vague, q.queued_before FROM queue q JOIN me ON me.id = q.id
    ), tenants_open AS (
        SELECT t.id, rank() OVER (ORDER BY
            (SELECT count(*) FROM running r WHERE r.tenant_id = t.id),
            coalesce(t.last_scheduled_at <= clock_timestamp() - make_interval(secs => :turn_seconds), true),
            t.last_scheduled_at NULLS FIRST, t.id
        ) AS place FROM tenants t WHERE t.id IN (SELECT tenant_id FROM open_jobs)
    ), others AS (
        SELECT t.id, t.place < own.place AS is_before,
            mine.ahead + CASE WHEN t.place < own.place THEN :turn_seconds ELSE 0 END AS share
        FROM mine CROSS JOIN me JOIN tenants_open own ON own.id = me.tenant_id JOIN tenants_open t ON t.id <> me.tenant_id
    ), beside AS (
        SELECT count(*) FILTER (WHERE q.is_queued) AS queued, sum(least(q.seconds, o.share - q.ahead)) AS seconds,
            coalesce(bool_or(q.is_vague OR q.seconds IS NULL), false) AS is_vague
        FROM others o JOIN queue q ON q.tenant_id = o.id AND (q.ahead < o.share OR o.is_before AND q.ahead = o.share)
    )
    SELECT clock_timestamp() AS now, mine.queued_before AS own_jobs_before,
        CASE WHEN NOT mine.is_vague AND NOT beside.is_vague THEN mine.queued_before + beside.queued END AS jobs_before,
        CASE WHEN NOT mine.is_vague THEN mine.ahead END AS own_seconds,
        CASE WHEN NOT beside.is_vague THEN coalesce(beside.seconds, 0) END AS other_seconds,
        (SELECT count(*) FROM live WHERE is_able) AS workers,
        (SELECT count(*) FROM live WHERE is_able AND worker_id NOT IN (SELECT worker_id FROM busy)) AS idle,
        (SELECT min(seconds) FROM running JOIN live USING (worker_id) WHERE is_able) AS free_seconds,
        (SELECT CASE WHEN count(*) = 0 THEN 0 WHEN count(r.seconds) = count(*) THEN max(r.seconds) END
            FROM running r JOIN job_units u ON u.artifact_key = r.artifact_key
            WHERE u.job_id = :job AND u.state = 'pending') AS artifact_seconds
    FROM (SELECT) AS one LEFT JOIN mine ON true LEFT JOIN beside ON true
""")


_MOST_OPEN = 10_000
"""Jobs that have not ended, of which an estimate is made: it reads them all."""
_IS_LONG = text("""
    SELECT count(*) > :most FROM (
        SELECT FROM selection_jobs WHERE status IN ('queued', 'running') LIMIT :most + 1
    ) AS open
""")
_IN_LONG_QUEUE = text(f"""
    {_LIVE}
    SELECT clock_timestamp() AS now, (SELECT count(*) FROM live WHERE is_able) AS workers, (
        SELECT count(*) FROM selection_jobs j JOIN me USING (tenant_id)
        WHERE j.status = 'queued' AND NOT j.awaits_datasets AND (j.created_at, j.id) < (me.created_at, me.id)
    ) AS own_jobs_before
""")


def place(session: Session, settings: LedgerSettings, job: SelectionJob) -> QueuePlace:
    """The place of the job, and when it may start."""
    is_waiting = job.status == JobStatus.QUEUED and not job.awaits_datasets
    if is_waiting and session.scalar(_IS_LONG, {"most": _MOST_OPEN}):
        return _in_long_queue(session, settings, job)
    found = session.execute(
        _FIGURES, {"job": job.id, "lease_seconds": settings.lease_seconds, "turn_seconds": settings.turn_seconds}
    ).one()
    in_queue = job.status == JobStatus.QUEUED and found.own_jobs_before is not None
    seconds = seconds_until_start(_figures(found)) if in_queue and found.workers else None
    return QueuePlace(
        job_id=job.id,
        status=job.status,
        own_jobs_before=found.own_jobs_before if in_queue else None,
        jobs_before=found.jobs_before if in_queue else None,
        workers=found.workers,
        starts_at=None if seconds is None else found.now + timedelta(seconds=seconds),
        no_estimate=None if seconds is not None else _reason(job, found),
        as_of=found.now,
    )


def _in_long_queue(session: Session, settings: LedgerSettings, job: SelectionJob) -> QueuePlace:
    found = session.execute(_IN_LONG_QUEUE, {"job": job.id, "lease_seconds": settings.lease_seconds}).one()
    return QueuePlace(
        job_id=job.id,
        status=job.status,
        own_jobs_before=found.own_jobs_before,
        jobs_before=None,
        workers=found.workers,
        starts_at=None,
        no_estimate=NoEstimate.LONG_QUEUE,
        as_of=found.now,
    )


def _figures(found: Any) -> Figures:
    return Figures(**{name: getattr(found, name) for name in Figures.__dataclass_fields__})


def _reason(job: SelectionJob, found: Any) -> NoEstimate:
    if job.status != JobStatus.QUEUED:
        return NoEstimate.NOT_QUEUED
    if job.awaits_datasets:
        return NoEstimate.IMPORTING
    return NoEstimate.NO_RATE if found.workers else NoEstimate.NO_WORKER
