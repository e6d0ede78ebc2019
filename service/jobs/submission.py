"""A job is written by one statement, which checks what may have changed since it was drafted: the idempotency key, the datasets,
the quotas of its key. So no lock is held longer than that statement. What a plain submission needs to know is read by another.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

from fastapi import Request
from sqlalchemy.orm import Session

from service.auth.principal import Principal
from service.auth.quotas import limits_of
from service.datasets import repository as datasets
from service.datasets.tables import Dataset
from service.db.locks import Lock
from service.idempotency.repository import KEPT
from service.ledger.tables import SelectionJob
from service.plan.preparing import prepare_unit
from service.settings import LimitSettings

_IS_KEPT = f"created_at > now() - interval '{KEPT.total_seconds():.0f} seconds'"

_LOOK_UP = f"""
    SELECT clock_timestamp() AS now, i.request_sha256, i.status, i.headers, i.sealed_body, p.row_count AS pool_rows,
        t.row_count AS target_rows
    FROM (SELECT) AS one
    LEFT JOIN idempotency_keys i ON i.tenant_id = %(tenant)s AND i.key = %(key)s AND i.{_IS_KEPT}
    LEFT JOIN datasets p ON p.id = %(pool)s AND p.tenant_id = %(tenant)s AND p.deleted_at IS NULL
    LEFT JOIN datasets t ON t.id = %(target)s AND t.tenant_id = %(tenant)s AND t.deleted_at IS NULL
"""

# Each part reads those before it. A row that is locked is read as it is then; of `key_samples` the statement sees those of its
# beginning, to which later ones only add: what came since is in the sum of the locked row.
_SUBMIT = f"""
WITH held AS MATERIALIZED (
    SELECT coalesce(pg_try_advisory_xact_lock(hashtextextended(%(lock)s::text, 0)), true) AS is_free,
        pg_advisory_xact_lock_shared({Lock.ARTIFACTS.value}) AS shared
), data AS MATERIALIZED (
    SELECT id, fingerprint IS NULL AS is_awaited FROM datasets
    WHERE id IN (%(pool_id)s, %(target_id)s) AND tenant_id = %(tenant_id)s AND deleted_at IS NULL ORDER BY id FOR SHARE
), before AS MATERIALIZED (
    SELECT coalesce((
        SELECT samples_before FROM key_samples
        WHERE key_id = %(key_id)s AND second > statement_timestamp() - interval '1 day 1 second' ORDER BY second LIMIT 1
    ), (SELECT samples FROM key_usage WHERE key_id = %(key_id)s)) AS samples
), used AS MATERIALIZED (
    SELECT open_jobs, samples FROM key_usage WHERE key_id = %(key_id)s FOR UPDATE
), verdict AS MATERIALIZED (
    SELECT CASE
        WHEN NOT is_free THEN 'key'
        WHEN NOT EXISTS (SELECT FROM data WHERE id = %(pool_id)s) THEN 'pool'
        WHEN NOT EXISTS (SELECT FROM data WHERE id = %(target_id)s) THEN 'target'
        WHEN used.open_jobs >= nullif(%(most_jobs)s::bigint, 0) THEN 'concurrent_jobs'
        WHEN used.samples - before.samples + %(samples)s::bigint > nullif(%(most_samples)s::bigint, 0) THEN 'samples_per_day'
    END AS refused FROM held CROSS JOIN before LEFT JOIN used ON true
), kept AS (
    INSERT INTO idempotency_keys (tenant_id, key, request_sha256, status, headers, sealed_body)
    SELECT %(tenant_id)s, %(key)s, %(request_sha256)s::bytea, %(status)s::integer, %(headers)s::jsonb, %(sealed_body)s::bytea
    FROM verdict WHERE refused IS NULL AND %(lock)s::text IS NOT NULL
    ON CONFLICT (tenant_id, key) DO UPDATE SET request_sha256 = excluded.request_sha256, status = excluded.status,
        headers = excluded.headers, sealed_body = excluded.sealed_body, created_at = now()
        WHERE NOT idempotency_keys.{_IS_KEPT}
    RETURNING key
), job AS (
    INSERT INTO selection_jobs (id, tenant_id, key_id, status, pool_id, target_id, model, budget, parameters, request,
        job_metadata, name, labels, folded_name, terms, trace, awaits_datasets, awaits_plan, retry_of, reproduces, created_at)
    SELECT %(id)s, %(tenant_id)s, %(key_id)s, 'queued'::job_status, %(pool_id)s, %(target_id)s, %(model)s::jsonb,
        %(budget)s::bigint, %(parameters)s::jsonb, %(request)s::jsonb, %(job_metadata)s::jsonb, %(name)s,
        %(labels)s::jsonb, %(folded_name)s, %(terms)s::varchar[], %(trace)s, %(awaits_datasets)s,
        %(awaits_plan)s, %(retry_of)s, %(reproduces)s, %(created_at)s::timestamptz
    FROM verdict WHERE refused IS NULL AND (%(lock)s::text IS NULL OR EXISTS (SELECT FROM kept))
    ON CONFLICT (id) DO NOTHING
    RETURNING id
), unit AS (
    INSERT INTO job_units (job_id, stage, shard, artifact_key, spec, state, progress_total)
    SELECT id, %(stage)s::stage, %(shard)s, %(artifact_key)s, %(spec)s::jsonb, 'pending'::unit_state, %(samples)s::bigint
    FROM job WHERE %(awaits_plan)s
), event AS (
    INSERT INTO job_events (job_id, type, data)
    SELECT job.id, kind, data FROM job CROSS JOIN (
        SELECT 1 AS number, 'job.queued' AS kind, '{{}}'::jsonb AS data
        UNION ALL SELECT 2, 'job.waiting', jsonb_build_object('reason', 'A dataset is being imported.', 'datasets', (
            SELECT coalesce(jsonb_agg(id ORDER BY role), '[]')
            FROM (VALUES (1, %(pool_id)s), (2, %(target_id)s)) AS asked (role, id) JOIN data USING (id) WHERE is_awaited
        )) WHERE %(awaits_datasets)s
    ) events ORDER BY number
), entry AS (
    INSERT INTO audit_log (tenant_id, key_id, actor, action, object_id, request_id, detail)
    SELECT %(tenant_id)s, %(key_id)s, 'api', %(action)s, id, %(request_id)s, %(detail)s::jsonb FROM job
)
SELECT refused, EXISTS (SELECT FROM job) AS is_written FROM verdict
"""
_UNKEPT: Mapping[str, Any] = dict.fromkeys(("key", "request_sha256", "status", "headers", "sealed_body"))


@dataclass(frozen=True, slots=True)
class Known:
    """What a plain submission needs of the database: the time there, the answer that is kept under its key, and its datasets."""

    now: datetime
    answered: Any
    pool: Dataset
    target: Dataset

    @property
    def is_ready(self) -> bool:
        """Whether the tenant has both datasets, and their rows; if not, the usual way finds out what is wrong."""
        return self.pool.row_count is not None and self.target.row_count is not None


async def look_up(request: Request, principal: Principal, key: str | None, asked: Mapping[str, Any]) -> Known | None:
    """Of a request with that idempotency key and body. None: there is nothing to look up.

    Raises:
        Away: the usual way must look.
    """
    pool, target = (value if _is_dataset(value := asked.get(name)) else None for name in ("pool", "target"))
    if key is None and (pool is None or target is None):
        return None
    tenant = principal.tenant_id
    values = {"tenant": tenant, "key": key, "pool": pool, "target": target}
    (row,) = await request.app.state.reader.rows(tenant, _LOOK_UP, values)
    of_pool, of_target = Dataset(id=pool, row_count=row.pool_rows), Dataset(id=target, row_count=row.target_rows)
    return Known(row.now, None if row.status is None else row, of_pool, of_target)


def _is_dataset(value: Any) -> bool:
    return isinstance(value, str) and datasets.is_id(value)


def now(session: Session) -> datetime:
    """The time of the database."""
    found: datetime = session.connection().exec_driver_sql("SELECT clock_timestamp()").scalar_one()
    return found


def values_of(
    principal: Principal,
    limits: LimitSettings,
    job: SelectionJob,
    samples: int,
    *,
    action: str,
    detail: Mapping[str, Any],
    lock: str | None,
    kept: Mapping[str, Any] | None,
) -> Mapping[str, Any]:
    """What is written of a job: with its first unit (where it awaits no dataset), first events, audit entry and answer.

    Args:
        samples: of the datasets that are ready.
        lock: of the idempotency key under which the answer is `kept`.
    """
    of_key, unit = limits_of(principal, limits), prepare_unit(job.id, samples)
    return {
        **{name: getattr(job, name) for name in _PLAIN_COLUMNS},
        **{name: json.dumps(getattr(job, name)) for name in _JSON_COLUMNS},
        "awaits_datasets": bool(job.awaits_datasets),
        "awaits_plan": bool(job.awaits_plan),
        "samples": samples,
        "most_jobs": of_key.concurrent_jobs,
        "most_samples": of_key.samples_per_day,
        "stage": unit.stage.value,
        "shard": unit.shard,
        "artifact_key": unit.artifact_key,
        "spec": json.dumps(unit.spec),
        "action": action,
        "detail": json.dumps(detail),
        "request_id": principal.request_id,
        "lock": lock,
        **_UNKEPT,
        **({} if kept is None else {**kept, "headers": json.dumps(kept["headers"])}),
    }


def write(session: Session, values: Mapping[str, Any]) -> str | None:
    """Writes these `values_of` a job.

    Returns:
        None where it was written; else nothing was, and why not: `answered`, where the key has an answer by now, or `key`, which
        is in use; `pool` or `target`, which is gone; or the quota.
    """
    statement: LiteralString = _SUBMIT
    (row,) = session.connection().exec_driver_sql(statement, dict(values))
    return _refused(row, values)


async def write_at_once(request: Request, values: Mapping[str, Any]) -> str | None:
    """As `write`, in the event loop.

    Raises:
        Away: it may have been written; `write` does it then, and not twice.
    """
    (row,) = await request.app.state.reader.write(values["tenant_id"], _SUBMIT, values)
    return _refused(row, values)


def _refused(row: Any, values: Mapping[str, Any]) -> str | None:
    """Without a key, only a job that is written already is not written."""
    return row.refused or (None if row.is_written or values["lock"] is None else "answered")


_PLAIN_COLUMNS = (
    *("id", "tenant_id", "key_id", "pool_id", "target_id", "budget", "name", "folded_name", "terms", "trace"),
    *("retry_of", "reproduces", "created_at"),
)
_JSON_COLUMNS = ("model", "parameters", "request", "job_metadata", "labels")
