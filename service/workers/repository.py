"""The SQL that shows workers to a tenant, whose own work alone it names."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.orm import Session

_PAGE = text("""
    WITH units AS (
        SELECT DISTINCT ON (u.worker_id) u.worker_id, j.tenant_id = :tenant_id AS is_own, u.job_id, u.stage::text, u.shard,
            u.attempt, u.progress_done AS done, u.progress_total AS total, u.started_at
        FROM job_units u JOIN selection_jobs j ON j.id = u.job_id WHERE u.state = 'running'
        ORDER BY u.worker_id, u.started_at DESC
    ), tasks_run AS (
        SELECT DISTINCT ON (worker_id) worker_id, tenant_id = :tenant_id AS is_own, kind, subject, started_at
        FROM tasks WHERE state = 'running' ORDER BY worker_id, started_at DESC
    )
    SELECT w.worker_id AS id, w.version, w.device, w.memory_bytes, w.matmul_rates, w.started_at, w.seen_at,
        w.seen_at > clock_timestamp() - make_interval(secs => :lease_seconds) AS is_alive,
        EXISTS (SELECT FROM jsonb_array_elements(w.lacks) lack WHERE NOT lack ?| '{model,job_id}') AS is_unable,
        coalesce(u.worker_id, t.worker_id) IS NOT NULL AS is_busy,
        CASE WHEN u.is_own THEN to_jsonb(u) END AS unit, CASE WHEN t.is_own THEN to_jsonb(t) END AS task,
        ARRAY(
            SELECT DISTINCT lack ->> 'problem' FROM jsonb_array_elements(w.lacks) lack
            WHERE NOT lack ?| '{model,job_id}' OR EXISTS (
                SELECT FROM selection_jobs j WHERE j.tenant_id = :tenant_id AND j.status IN ('queued', 'running', 'cancelling')
                    AND coalesce(lack -> 'model' = j.model, true) AND coalesce(lack ->> 'job_id' = j.id, true)
            ) ORDER BY 1
        ) AS problems
    FROM workers w LEFT JOIN units u USING (worker_id) LEFT JOIN tasks_run t USING (worker_id)
    WHERE w.stopped_at IS NULL AND w.seen_at > clock_timestamp() - interval '1 day' AND w.worker_id > :after
    ORDER BY w.worker_id LIMIT :limit
""")


def page(
    session: Session, tenant_id: str, *, lease_seconds: float, after: str | None, limit: int
) -> tuple[Sequence[Row[Any]], bool]:
    """The workers of the last day that have not reported their end, by id, and whether there are more.

    `unit` and `task` are of the tenant alone, as are `problems` that are about jobs.
    """
    values = {"tenant_id": tenant_id, "lease_seconds": lease_seconds, "after": after or "", "limit": limit + 1}
    found = session.execute(_PAGE, values).all()
    return found[:limit], len(found) > limit
