"""Making keys, and telling whose key a request carries."""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session

from service.database import SessionDep
from service.errors import Unauthorized
from service.ids import new_id
from service.settings import ApiSettings
from service.tenants import repository
from service.tenants.tables import ApiKey, Tenant

_SCHEME = "wnw"
_KEY = re.compile(rf"{_SCHEME}_([0-9a-f]{{12}})_[A-Za-z0-9_-]{{43}}")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: every query below a router is scoped to `tenant_id`."""

    tenant_id: str
    key_id: str


def _digest(secret_key: str, key: str) -> bytes:
    return hmac.new(secret_key.encode(), key.encode(), hashlib.sha256).digest()


def create_key(session: Session, *, tenant_name: str, key_name: str, secret_key: str) -> str:
    """Makes a key of the tenant, which is created where it is new. The key is returned here and shown nowhere again."""
    tenant = repository.tenant_by_name(session, tenant_name)
    if tenant is None:
        tenant = Tenant(id=new_id("tnt"), name=tenant_name)
        session.add(tenant)
        session.flush()
    prefix = secrets.token_hex(6)
    key = f"{_SCHEME}_{prefix}_{secrets.token_urlsafe(32)}"
    session.add(
        ApiKey(id=new_id("key"), tenant_id=tenant.id, name=key_name, prefix=prefix, digest=_digest(secret_key, key))
    )
    return key


def authenticate(session: Session, key: str, secret_key: str) -> Caller:
    """The caller of a key; the comparison takes the same time wherever the key differs.

    Raises:
        Unauthorized: the key is malformed, unknown or revoked.
    """
    parts = _KEY.fullmatch(key)
    row = repository.live_key(session, parts[1]) if parts is not None else None
    expected = row.digest if row is not None else bytes(32)
    if not hmac.compare_digest(_digest(secret_key, key), expected) or row is None:
        raise Unauthorized(
            "The API key is not valid. Send `Authorization: Bearer wnw_...`; make a key with `winnow keys create`.",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return Caller(tenant_id=row.tenant_id, key_id=row.id)


_bearer = HTTPBearer(auto_error=False, description="An API key: `wnw_...`")


def _caller(
    request: Request,
    session: SessionDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Caller:
    if credentials is None:
        raise Unauthorized(
            "No API key. Send `Authorization: Bearer wnw_...`; make a key with `winnow keys create`.",
            headers={"WWW-Authenticate": "Bearer"},
        )
    settings: ApiSettings = request.app.state.settings
    return authenticate(session, credentials.credentials, settings.secret_key.get_secret_value())


CallerDep = Annotated[Caller, Depends(_caller)]
