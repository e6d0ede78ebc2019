"""`/v1/usage`: what a key has used of its limits."""

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from service.database import SessionDep
from service.errors import Forbidden, Unauthorized, responses
from service.limits import quotas, repository
from service.settings import ApiSettings
from service.tenants.service import ReadDep

router = APIRouter(tags=["keys"], responses=responses(Unauthorized, Forbidden))


class Used(BaseModel):
    used: int
    limit: int | None = Field(description="null: none")


class Usage(BaseModel):
    object: Literal["usage"] = "usage"
    key_id: str
    requests_per_minute: Used = Field(description="In the process that answers")
    concurrent_jobs: Used = Field(description="Jobs that have not ended")
    stored_bytes: Used = Field(description="Of the rows of its datasets")
    samples_per_day: Used = Field(description="Rows of pool and target of its jobs of the last 24 hours")


@router.get("/usage", summary="What your key has used of its limits")
def get_usage(request: Request, session: SessionDep, caller: ReadDep) -> Usage:
    settings: ApiSettings = request.app.state.settings
    limits = quotas.of_key(caller, settings.limits)
    used = {
        "requests_per_minute": request.app.state.rate.used(caller.key_id, limits.requests_per_minute),
        "concurrent_jobs": repository.open_jobs(session, caller.tenant_id, caller.key_id),
        "stored_bytes": repository.stored_bytes(session, caller.key_id),
        "samples_per_day": repository.samples_today(session, caller.key_id)[0],
    }
    counted = {name: Used(used=value, limit=getattr(limits, name) or None) for name, value in used.items()}
    return Usage(key_id=caller.key_id, **counted)
