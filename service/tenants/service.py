"""Making keys, and telling whose key a request carries."""

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from service.audit import service as audit
from service.database import SessionDep
from service.errors import Forbidden, Unauthorized
from service.ids import new_id
from service.settings import ApiSettings
from service.tenants import repository
from service.tenants.caller import Caller, Scope
from service.tenants.tables import ApiKey, Tenant

log = logging.getLogger(__name__)

KEY_START = "wnw_"
_KEY = re.compile(rf"{KEY_START}([0-9a-f]{{12}})_[A-Za-z0-9_-]{{43}}")
_USE_EVERY = timedelta(minutes=1)


def _digest(secret_key: str, key: str) -> bytes:
    return hmac.new(secret_key.encode(), key.encode(), hashlib.sha256).digest()


def create_key(
    session: Session,
    *,
    tenant_name: str,
    key_name: str,
    secret_key: str,
    scopes: Collection[Scope] = (Scope.READ, Scope.SUBMIT),
    expires_at: datetime | None = None,
) -> str:
    """Makes a key of the tenant, which is created where it is new, for an operator (or a test of ours). Returns the key."""
    tenant = repository.tenant_by_name(session, tenant_name)
    if tenant is None:
        tenant = Tenant(id=new_id("tnt"), name=tenant_name)
        session.add(tenant)
        session.flush()
    row, key = make_key(
        session, tenant_id=tenant.id, name=key_name, secret_key=secret_key, scopes=scopes, expires_at=expires_at
    )
    named = {"name": key_name, "prefix": row.prefix, "scopes": row.scopes}
    audit.record_own(session, "cli", tenant.id, "key.created", row.id, **named)
    return key


def make_key(
    session: Session,
    *,
    tenant_id: str,
    name: str,
    secret_key: str,
    scopes: Collection[Scope],
    expires_at: datetime | None,
    limits: Mapping[str, int] | None = None,
) -> tuple[ApiKey, str]:
    """Writes a new key's row; with it returns the key, which is shown nowhere again."""
    prefix = secrets.token_hex(6)
    key = f"{KEY_START}{prefix}_{secrets.token_urlsafe(32)}"
    row = ApiKey(
        id=new_id("key"),
        tenant_id=tenant_id,
        name=name,
        prefix=prefix,
        digest=_digest(secret_key, key),
        scopes=sorted(scopes),
        limits=dict(limits or {}),
        expires_at=expires_at,
    )
    repository.add(session, row)
    return row, key


def authenticate(session: Session, key: str, secret_key: str) -> Caller:
    """The caller of a key.

    Raises:
        Unauthorized: the key is malformed, unknown, expired or revoked.
    """
    return _caller_of(_authentic(session, key, secret_key))


def _caller_of(row: ApiKey) -> Caller:
    scopes = frozenset(Scope(scope) for scope in row.scopes)
    return Caller(tenant_id=row.tenant_id, key_id=row.id, scopes=scopes, limits=row.limits)


def _authentic(session: Session, key: str, secret_key: str) -> ApiKey:
    """The row of a valid key; the comparison takes the same time wherever the key differs, and the error tells nothing of why.

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
    return row


def _note_use(session: Session, row: ApiKey) -> None:
    """Commits when the key was used, at most once a minute, whatever becomes of the request: so the session must be new."""
    if row.last_used_at is not None and datetime.now(UTC) - row.last_used_at < _USE_EVERY:
        return
    try:
        repository.note_use(session, row.id)
        session.commit()
    except DBAPIError as error:  # a database that can only be read must still answer
        session.rollback()
        log.warning("the use of key %s was not written (%s)", row.id, type(error).__name__)


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
    row = _authentic(session, credentials.credentials, settings.secret_key.get_secret_value())
    _note_use(session, row)
    return replace(_caller_of(row), request_id=request.state.request_id)


def _allowed(scope: Scope) -> Callable[[Caller], Coroutine[Any, Any, Caller]]:
    async def check(caller: CallerDep) -> Caller:  # async: a thread would cost more than it does
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
