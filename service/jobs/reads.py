"""How polls and lists of jobs are answered: usually by one statement that finds the key, the jobs and their stages at once."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from fastapi import Request, Response

from service.auth import authentication
from service.auth.principal import Scope
from service.auth.repository import LIVE_KEY
from service.db.reader import Away
from service.http import etags
from service.http.pagination import Page
from service.jobs import service
from service.jobs.schemas import EventOut, EventPage, SelectionJobOut
from service.ledger.state import TERMINAL, JobStatus

RETRY_AFTER_SECONDS = "2"

# Plain queries of lists; what is not of this form is looked at, and refused, by the route.
_JOBS_QUERY = re.compile(r"limit=(?P<limit>\d{1,3})|after=(?P<after>job_[0-9a-f]{32})|status=(?P<status>[a-z]{1,10})")
_EVENTS_QUERY = re.compile(r"limit=(?P<limit>\d{1,3})|after=(?P<after>\d{1,18})")
_STATUSES = frozenset(JobStatus)
_MOST = 100  # entries: more of them would hold up the event loop, and are written in a thread


_COLUMNS = """
    key.*, j.id, j.name, j.labels, j.status, j.model, j.pool_id, j.target_id, j.budget, j.parameters, j.job_metadata, j.error,
    j.retry_of, j.reproduces, j.created_at, j.started_at, j.cancel_requested_at, j.finished_at, (
        SELECT json_agg(s) FROM (
            SELECT stage, count(*) AS units, count(*) FILTER (WHERE state = 'succeeded') AS units_done,
                count(*) FILTER (WHERE (result ->> 'reused')::boolean) AS units_reused, sum(progress_done)::bigint AS done,
                sum(progress_total)::bigint AS total, min(started_at) AS started_at, max(finished_at) AS finished_at,
                clock_timestamp() AS now
            FROM job_units WHERE job_id = j.id GROUP BY stage ORDER BY stage
        ) s
    ) AS stages
"""
_JOB = f"""
    WITH key AS ({LIVE_KEY}) SELECT {_COLUMNS}
    FROM key JOIN selection_jobs j ON j.id = %(job)s AND j.tenant_id = key.tenant_id AND j.deleted_at IS NULL
"""


def _page(asked: Mapping[str, str], limit: int) -> str:
    """The limit is in the text: by a parameter the planner could not tell a page of 20 from all jobs."""
    more = (" AND id < %(after)s" if "after" in asked else "") + (
        " AND status = %(status)s" if "status" in asked else ""
    )
    return f"""
        WITH key AS ({LIVE_KEY}) SELECT {_COLUMNS}
        FROM key LEFT JOIN LATERAL (
            SELECT * FROM selection_jobs WHERE tenant_id = key.tenant_id AND deleted_at IS NULL{more}
            ORDER BY id DESC LIMIT {limit}
        ) j ON true
        ORDER BY j.id DESC
    """


def _events(limit: int) -> str:
    return f"""
        WITH key AS ({LIVE_KEY}) SELECT key.*, e.id, e.type, e.created_at, e.data
        FROM key JOIN selection_jobs j ON j.id = %(job)s AND j.tenant_id = key.tenant_id AND j.deleted_at IS NULL
        LEFT JOIN LATERAL (
            SELECT * FROM job_events WHERE job_id = j.id AND id > %(after)s ORDER BY id LIMIT {limit}
        ) e ON true
        ORDER BY e.id
    """


async def job_at_once(request: Request, job_id: str) -> Response | None:
    """The answer, where it is a plain 200; None for all else: a query, an error, or a database that is away."""
    if request.scope["query_string"]:
        return None
    found = await _found(request, _JOB, {"job": job_id})
    return None if found is None else job_answer(request, _described(found[0]), wait=0)


async def current(request: Request, job_id: str) -> SelectionJobOut | None:
    """The job, for a request that was admitted; None where the usual way must look: there is no such job, the key is not valid
    any more, or the database is away."""
    if (asked := authentication.Asked.by(request)) is None:
        return None
    try:
        rows = await request.app.state.reader.rows(asked.tenant, _JOB, {"prefix": asked.prefix, "job": job_id})
    except Away:
        return None
    return _described(rows[0]) if rows else None


async def page_at_once(request: Request) -> Response | None:
    """The answer, where it is a plain 200; None for all else."""
    asked = _asked(request, _JOBS_QUERY, 20)
    if asked is None or asked.get("status", JobStatus.QUEUED) not in _STATUSES:
        return None
    limit = int(asked.pop("limit"))
    found = await _found(request, _page(asked, limit + 1), asked)
    if found is None:
        return None
    jobs = [_described(row) for row in found if row.id is not None]
    return page_answer(jobs[:limit], has_more=len(jobs) > limit)


async def events_at_once(request: Request, job_id: str) -> Response | None:
    """The answer, where it is a plain 200; None for all else, as is a stream."""
    asked = _asked(request, _EVENTS_QUERY, 100)
    if asked is None or "text/event-stream" in request.headers.get("accept", "") or "last-event-id" in request.headers:
        return None
    limit = int(asked["limit"])
    found = await _found(request, _events(limit + 1), {"job": job_id, "after": int(asked.get("after", 0))})
    if found is None:
        return None
    events = [EventOut.model_validate(row) for row in found if row.id is not None]
    return events_answer(events[:limit], has_more=len(events) > limit)


def _asked(request: Request, form: re.Pattern[str], limit: int) -> dict[str, str] | None:
    """The parameters of a query of that form, each once, with the limit or the usual one."""
    asked = {"limit": str(limit)}
    parts = list(filter(None, request.scope["query_string"].decode("latin-1").split("&")))
    matches = [match for part in parts if (match := form.fullmatch(part)) is not None]
    asked |= {match.lastgroup: match[match.lastgroup] for match in matches if match.lastgroup is not None}
    is_plain = len(matches) == len(parts) == len({match.lastgroup for match in matches})
    return asked if is_plain and 0 < int(asked["limit"]) <= _MOST else None


def job_answer(request: Request, job: SelectionJobOut, wait: int) -> Response:
    """With an ETag once the job has ended."""
    if job.status in TERMINAL:
        return etags.answer_by_content(request, job)
    headers = {"Retry-After": "0" if wait else RETRY_AFTER_SECONDS}
    return Response(job.model_dump_json(), media_type="application/json", headers=headers)


def page_answer(jobs: Sequence[SelectionJobOut], has_more: bool) -> Response:
    return Response(Page[SelectionJobOut].of(jobs, has_more).model_dump_json(), media_type="application/json")


def events_answer(events: Sequence[EventOut], has_more: bool) -> Response:
    return Response(EventPage.of(events, has_more).model_dump_json(), media_type="application/json")


async def _found(request: Request, statement: str, values: Mapping[str, Any]) -> list[Any] | None:
    """The rows, if there are any and the request may have them."""
    if (asked := authentication.Asked.by(request)) is None:
        return None
    try:
        rows = await request.app.state.reader.rows(asked.tenant, statement, {"prefix": asked.prefix, **values})
    except Away:
        return None
    return list(rows) if rows and await authentication.admit_at_once(request, asked, rows[0], Scope.READ) else None


def _described(row: Any) -> SelectionJobOut:
    return service.describe_one(row, [_stage(stage) for stage in row.stages or ()])


def _stage(row: Mapping[str, Any]) -> SimpleNamespace:
    """As `repository.stage_rows` has it; in JSON times are text."""
    times = {name: row[name] and datetime.fromisoformat(row[name]) for name in ("started_at", "finished_at", "now")}
    return SimpleNamespace(**{**row, **times})
