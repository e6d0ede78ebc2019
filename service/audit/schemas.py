"""The audit log as its tenant's admin sees it."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field


class AuditKey(BaseModel):
    """The API key that it was done with; never the key itself."""

    id: str
    prefix: str | None = Field(description="What the key begins with, after `wnw_`", examples=["4f1d9c02ab7e"])
    name: str | None = Field(examples=["ci"])


class AuditEntryOut(BaseModel):
    object: Literal["audit_entry"] = "audit_entry"
    id: int
    created_at: datetime
    actor: Literal["api", "cli", "system"] = Field(
        description="`api`: who holds the key; `cli`: an operator of the server; `system`: the server by itself (retention)"
    )
    key: AuditKey | None = Field(description="null unless the actor is `api`")
    action: str = Field(examples=["selection_job.created"])
    object_id: str = Field(description="What it was done to")
    request_id: str | None = Field(description="`X-Request-Id` of the request")
    detail: dict[str, Any]


class AuditPage(BaseModel):
    """Entries newest first; `after` = `last_id` continues."""

    object: Literal["list"] = "list"
    data: list[AuditEntryOut]
    has_more: bool
    last_id: int | None
