"""The audit log as its tenant's admin sees it."""

from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, Field

from service.audit.tables import AuditEntry
from service.auth.tables import ApiKey
from service.http.pagination import NumberedPage


class AuditKey(BaseModel):
    """The API key that was used; never its secret part."""

    id: str
    prefix: str | None = Field(description="The start of the key, after `wnw_`", examples=["4f1d9c02ab7e"])
    name: str | None = Field(examples=["ci"])


class AuditEntryOut(BaseModel):
    object: Literal["audit_entry"] = "audit_entry"
    id: int
    created_at: datetime
    actor: Literal["api", "cli", "system"] = Field(
        description="`api`: the holder of the key; `cli`: an operator of the server; `system`: the server itself (retention)"
    )
    key: AuditKey | None = Field(description="null unless the actor is `api`")
    action: str = Field(examples=["selection_job.created"])
    object_id: str = Field(description="The object of the action")
    request_id: str | None = Field(description="`X-Request-Id` of the request")
    detail: dict[str, Any]

    @classmethod
    def of(cls, entry: AuditEntry, key: ApiKey | None) -> Self:
        """The entry, done with this key; None if its row is gone or the actor had none."""
        names = {"prefix": key and key.prefix, "name": key and key.name}
        used = None if entry.key_id is None else AuditKey(id=entry.key_id, **names)
        columns = {name: getattr(entry, name) for name in cls.model_fields if name not in ("object", "key")}
        return cls(key=used, **columns)


class AuditPage(NumberedPage[AuditEntryOut]):
    """Entries newest first; `after` = `last_id` continues."""
