"""`/v1/usage`: what a key has used of its limits."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from service.auth.authentication import ReadDep
from service.auth.quotas import limits_of
from service.datasets.repository import stored_bytes
from service.datasets.uploads.repository import count as open_uploads
from service.db.engine import SessionDep
from service.http.errors import Forbidden, Unauthorized, responses
from service.jobs.repository import usage
from service.settings import ApiSettings

router = APIRouter(tags=["keys"], responses=responses(Unauthorized, Forbidden))


class Used(BaseModel):
    used: int
    limit: int | None = Field(description="null: none")


class Usage(BaseModel):
    object: Literal["usage"] = "usage"
    key_id: str
    requests_per_minute: Used = Field(description="In the last minute")
    concurrent_jobs: Used = Field(description="Jobs that have not ended")
    stored_bytes: Used = Field(
        description="Total size of the rows of its datasets, of the reports of those left out, and of its uploads in parts"
    )
    samples_per_day: Used = Field(description="Rows of pool and target of its jobs of the last 24 hours")
    open_uploads: Used = Field(description="Uploads in parts of which no dataset was made yet")


async def _requests(request: Request, principal: ReadDep) -> int:
    limit = limits_of(principal, request.app.state.settings.limits).requests_per_minute
    used: int = await request.app.state.rate.used(principal.key_id, limit)
    return used


RequestsDep = Annotated[int, Depends(_requests)]


@router.get("/usage", summary="Get your key's usage and limits")
def get_usage(request: Request, session: SessionDep, principal: ReadDep, requests: RequestsDep) -> Usage:
    settings: ApiSettings = request.app.state.settings
    limits = limits_of(principal, settings.limits)
    open_jobs, samples = usage(session, principal.key_id)
    used = {
        "requests_per_minute": requests,
        "concurrent_jobs": open_jobs,
        "stored_bytes": stored_bytes(session, principal.key_id),
        "samples_per_day": samples,
        "open_uploads": open_uploads(session, principal.key_id),
    }
    counted = {name: Used(used=value, limit=getattr(limits, name) or None) for name, value in used.items()}
    return Usage(key_id=principal.key_id, **counted)
