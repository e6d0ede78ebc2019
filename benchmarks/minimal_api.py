"""What the service's calls are compared with: the least that FastAPI, psycopg and the same rows allow for, without keys, limits,
logs, metrics, checks or a second form of an answer. Served by uvicorn as the service is; `WINNOW_DATABASE__URL` as there.

    python -m uvicorn --app-dir benchmarks minimal_api:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
from fastapi import FastAPI, Response
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

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


def _json(found: Any) -> Response:
    return Response(orjson.dumps(found), media_type="application/json")


@app.get("/v1/selection-jobs/{job_id}")
async def get_job(job_id: str) -> Response:
    return _json((await _rows(f"{_JOB} WHERE id = %s", job_id))[0])


@app.get("/v1/selection-jobs")
async def list_jobs(limit: int = 20) -> Response:
    return _json(await _rows(f"{_JOB} ORDER BY id DESC LIMIT %s", limit))


@app.get("/healthz")
async def ready() -> Response:
    return Response()
