"""Making keys, and telling whose key a request carries."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session

from service.database import SessionDep
from service.errors import Forbidden, Unauthorized
from service.ids import new_id
from service.settings import ApiSettings
from service.tenants import repository
from service.tenants.caller import Caller, Scope
from service.tenants.tables import ApiKey, Tenant

_SCHEME = "wnw"
_KEY = re.compile(rf"{_SCHEME}_([0-9a-f]{{12}})_[A-Za-z0-9_-]{{43}}")


def _digest(secret_key: str, key: str) -> bytes:
    return hmac.new(secret_key.encode(), key.encode(), hashlib.sha256).digest()


def create_key(
    session: Session,
    *,
    tenant_name: str,
    key_name: str,
    secret_key: str,
    scopes: Collection[Scope] = (Scope.READ, Scope.SUBMIT),
) -> str:
    """Makes a key of the tenant, which is created where it is new. The key is returned here and shown nowhere again."""
    tenant = repository.tenant_by_name(session, tenant_name)
    if tenant is None:
        tenant = Tenant(id=new_id("tnt"), name=tenant_name)
        session.add(tenant)
        session.flush()
    prefix = secrets.token_hex(6)
    key = f"{_SCHEME}_{prefix}_{secrets.token_urlsafe(32)}"
    session.add(
        ApiKey(
            id=new_id("key"),
            tenant_id=tenant.id,
            name=key_name,
            prefix=prefix,
            digest=_digest(secret_key, key),
            scopes=sorted(scopes),
        )
    )
    return key


def authenticate(session: Session, key: str, secret_key: str) -> Caller:
    """The caller of a key; the comparison takes the same time wherever the key differs.

    Raises:
        Unauthorized: the key is malformed, unknown, expired or revoked.
    """
    parts = _KEY.fullmatch(key)
    row = repository.live_key(session, parts[1]) if parts is not None else None
    expected = row.digest if row is not None else bytes(32)
    is_ours = hmac.compare_digest(_digest(secret_key, key), expected)
    if not is_ours or row is None or (row.expires_at is not None and row.expires_at <= datetime.now(UTC)):
        raise Unauthorized(
            "The API key is not valid. Send `Authorization: Bearer wnw_...`; make a key with `winnow keys create`.",
            headers={"WWW-Authenticate": "Bearer"},
        )
    scopes = frozenset(Scope(scope) for scope in row.scopes)
    return Caller(tenant_id=row.tenant_id, key_id=row.id, scopes=scopes, limits=row.limits)


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
    caller = authenticate(session, credentials.credentials, settings.secret_key.get_secret_value())
    return replace(caller, request_id=request.state.request_id)


def _allowed(scope: Scope) -> Callable[[Caller], Caller]:
    def check(caller: CallerDep) -> Caller:
        if scope not in caller.scopes:
            has = ", ".join(sorted(caller.scopes)) or "none"
            raise Forbidden(
                f"This needs a key with the scope `{scope}`; yours has: {has}."
                f" Make one with `winnow keys create --scope {scope}`.",
                code="insufficient_scope",
            )
        return caller

    return check


CallerDep = Annotated[Caller, Depends(_caller)]
ReadDep = Annotated[Caller, Depends(_allowed(Scope.READ))]
SubmitDep = Annotated[Caller, Depends(_allowed(Scope.SUBMIT))]
AdminDep = Annotated[Caller, Depends(_allowed(Scope.ADMIN))]
