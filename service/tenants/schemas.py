"""API keys as the client sees them."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from service.moments import Moment
from service.tenants.caller import Scope
from service.tenants.tables import ApiKey

Limit = Annotated[int | None, Field(ge=0, lt=2**63)]


class KeyLimits(BaseModel):
    """Limits of its own; those that are left out are the service's. 0: no limit."""

    model_config = ConfigDict(extra="forbid")

    requests_per_minute: Limit = None
    concurrent_jobs: Limit = None
    stored_bytes: Limit = None
    samples_per_day: Limit = None


class KeyRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")] = Field(
        description="What the key is for"
    )
    scopes: list[Scope] = Field(
        default=[Scope.READ, Scope.SUBMIT], min_length=1, max_length=len(Scope), description="None includes another"
    )
    expires_at: Moment | None = Field(default=None, description="With neither of the two it never expires")
    expires_in_days: int | None = Field(default=None, ge=1, le=3650)
    limits: KeyLimits = Field(
        default=KeyLimits(),
        description="At most those of the key that makes it, from which it has those that are left out",
    )

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        if self.expires_at is not None and self.expires_in_days is not None:
            raise ValueError("expires_at and expires_in_days: give one of the two")
        return self


class KeyObject(BaseModel):
    """A key without its secret part, which is kept nowhere."""

    object: Literal["api_key"] = "api_key"
    id: str
    name: str
    prefix: str = Field(description="How the key begins; by it a key in use is known", examples=["wnw_5c1d2e3f4a5b"])
    scopes: list[Scope]
    limits: KeyLimits
    created_at: datetime
    last_used_at: datetime | None = Field(description="Within a minute")
    expires_at: datetime | None
    revoked_at: datetime | None


class NewKey(KeyObject):
    key: str = Field(description="The key. It is shown here and never again", examples=["wnw_5c1d2e3f4a5b_..."])


def shown(row: ApiKey, start: str) -> dict[str, Any]:
    """The fields of `KeyObject`; `start` is what keys begin with. Never the digest."""
    limits = {name: value for name, value in row.limits.items() if name in KeyLimits.model_fields}
    names = ("id", "name", "scopes", "created_at", "last_used_at", "expires_at", "revoked_at")
    return {**{name: getattr(row, name) for name in names}, "prefix": start + row.prefix, "limits": limits}
