"""API keys as the client sees them."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from service.auth.authentication import KEY_PREFIX
from service.auth.principal import Scope
from service.auth.tables import ApiKey
from service.http.timestamps import Moment
from service.names import Name

Limit = Annotated[int | None, Field(ge=0, lt=2**63)]


class KeyLimits(BaseModel):
    """The key's own limits; omitted ones use the service's defaults. 0: no limit."""

    model_config = ConfigDict(extra="forbid")

    requests_per_minute: Limit = None
    concurrent_jobs: Limit = None
    stored_bytes: Limit = None
    samples_per_day: Limit = None
    open_uploads: Limit = None


class KeyRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[Name, StringConstraints(min_length=1, max_length=200)] = Field(description="What the key is for")
    scopes: list[Scope] = Field(
        default=[Scope.READ, Scope.SUBMIT], min_length=1, max_length=len(Scope), description="No scope includes another"
    )
    expires_at: Moment | None = Field(default=None, description="If neither of the two is given, the key never expires")
    expires_in_days: int | None = Field(default=None, ge=1, le=3650)
    limits: KeyLimits = Field(
        default=KeyLimits(),
        description="At most those of the key that creates it, which also supplies the omitted ones",
    )

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        if self.expires_at is not None and self.expires_in_days is not None:
            raise ValueError("give either expires_at or expires_in_days, not both")
        return self


class KeyOut(BaseModel):
    """A key without its secret part, which is not stored."""

    object: Literal["api_key"] = "api_key"
    id: str
    name: str
    prefix: str = Field(description="The start of the key, to recognise it", examples=["wnw_5c1d2e3f4a5b"])
    scopes: list[Scope]
    limits: KeyLimits
    created_at: datetime
    last_used_at: datetime | None = Field(description="Within a minute")
    expires_at: datetime | None
    revoked_at: datetime | None


class NewKey(KeyOut):
    key: str = Field(description="The key, shown only here", examples=["wnw_5c1d2e3f4a5b_..."])


def shown(row: ApiKey) -> dict[str, Any]:
    """The fields of `KeyOut`. Never the digest."""
    limits = {name: value for name, value in row.limits.items() if name in KeyLimits.model_fields}
    names = ("id", "name", "scopes", "created_at", "last_used_at", "expires_at", "revoked_at")
    return {**{name: getattr(row, name) for name in names}, "prefix": KEY_PREFIX + row.prefix, "limits": limits}
