"""What the service's calls are compared with: the least that FastAPI, psycopg and the same rows allow for, without keys, limits,
logs, metrics, checks or a second form of an answer. Served by uvicorn as the service is; `WINNOW_DATABASE__URL` as there.

    python -m uvicorn --app-dir benchmarks minimal_api:app
"""

import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
from fastapi import FastAPI, Response
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool
from pydantic import BaseModel

_JOB = """
SELECT id, status, model, pool_id, target_id, budget, parameters, job_metadata, error, created_at, started_at, finished_at, (
    SELECT json_agg(s) FROM (
        SELECT stage, count(*) AS units, sum(progress_done)::bigint AS done, sum(progress_total)::bigint AS total,
            min(started_at) AS started_at, max(finished_at) AS finished_at
        FROM job_units WHERE job_id = j.id GROUP BY stage ORDER BY stage
    ) s
) AS stages
FROM selection_jobs j
"""

pool = AsyncConnectionPool(
    os.environ["WINNOW_DATABASE__URL"].replace("+psycopg", ""),
    kwargs={"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row},
    min_size=4,
    max_size=4,
    open=False,
)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with pool:
        yield


app = FastAPI(lifespan=lifespan)


async def _rows(statement: str, *values: Any) -> Any:
    async with pool.connection() as connection:
        return await (await connection.execute(statement.encode(), values)).fetchall()


def _json(found: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(found), status, media_type="application/json")


@app.get("/v1/selection-jobs/{job_id}")
async def get_job(job_id: str) -> Response:
    return _json((await _rows(f"{_JOB} WHERE id = %s", job_id))[0])


@app.get("/v1/selection-jobs")
async def list_jobs(limit: int = 20) -> Response:
    return _json(await _rows(f"{_JOB} ORDER BY id DESC LIMIT %s", limit))


class JobRequest(BaseModel):
    model: str
    pool: str
    target: str
    budget: int


_DATASETS = "SELECT id, tenant_id, row_count FROM datasets WHERE id = ANY(%s)"
_INSERT = """
WITH job AS (
    INSERT INTO selection_jobs
        (id, tenant_id, key_id, status, pool_id, target_id, model, budget, parameters, request, job_metadata)
    SELECT %(id)s::text, d.tenant_id, k.id, 'queued'::job_status, %(pool)s::text, %(target)s, %(model)s, %(budget)s, '{}'::jsonb,
        %(request)s, '{}'::jsonb
    FROM datasets d JOIN api_keys k ON k.tenant_id = d.tenant_id WHERE d.id = %(pool)s::text LIMIT 1
    RETURNING *
), unit AS (
    INSERT INTO job_units (job_id, stage, shard, artifact_key, spec, state, progress_total)
    SELECT id, 'prepare'::stage, 0, 'prepare/' || id, '{}'::jsonb, 'pending'::unit_state, %(rows)s FROM job
)
SELECT * FROM job
"""


@app.post("/v1/selection-jobs", status_code=202)
async def create_job(body: JobRequest) -> Response:
    async with pool.connection() as connection, connection.transaction():
        found = await (await connection.execute(_DATASETS, [[body.pool, body.target]])).fetchall()
        values = {"id": f"job_{uuid.uuid4().hex}", "rows": sum(row["row_count"] for row in found), **body.model_dump()}
        values |= {"model": Jsonb({"name": body.model}), "request": Jsonb(body.model_dump())}
        return _json(await (await connection.execute(_INSERT, values)).fetchone(), 202)


@app.get("/healthz")
async def ready() -> Response:
    return Response()
