"""Creating, finding and revoking API keys."""

import secrets
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy.orm import Session

from service.audit import service as audit
from service.auth.authentication import KEY_PREFIX, key_digest
from service.auth.principal import Principal, Scope
from service.auth.quotas import limits_of
from service.auth.tables import ApiKey, KeyUsage, Tenant
from service.db.locks import advisory_lock
from service.http.errors import Conflict, Forbidden, NotFound, Unprocessable
from service.ids import new_id
from service.keys import repository
from service.keys.schemas import KeyLimits, KeyRequest
from service.settings import LimitSettings


def create_key(
    session: Session,
    *,
    tenant_name: str,
    key_name: str,
    secret_key: str,
    scopes: Collection[Scope] = (Scope.READ, Scope.SUBMIT),
    expires_at: datetime | None = None,
) -> str:
    """Creates a key for an operator, and its tenant if it does not exist. Returns the key."""
    tenant = repository.tenant_by_name(session, tenant_name)
    if tenant is None:
        tenant = Tenant(id=new_id("tnt"), name=tenant_name)
        session.add(tenant)
        session.flush()
    row, key = _make(session, secret_key, tenant_id=tenant.id, name=key_name, scopes=scopes, expires_at=expires_at)
    described = {"name": key_name, "prefix": row.prefix, "scopes": row.scopes}
    audit.record_own(session, "cli", tenant.id, "key.created", row.id, **described)
    return key


def create(
    session: Session, principal: Principal, request: KeyRequest, settings: LimitSettings, secret_key: str
) -> tuple[ApiKey, str]:
    """A new key of the principal's tenant: its row, and the key itself. It can do nothing that the principal's key cannot.

    Raises:
        Forbidden: the principal's key lacks a scope.
        Unprocessable: the expiry is in the past, or a limit exceeds the principal's; `param` names the field.
    """
    if missing := sorted(set(request.scopes) - principal.scopes):
        has = ", ".join(sorted(principal.scopes))
        raise Forbidden(
            f"scopes: a key can grant only scopes that it has; yours lacks {', '.join(missing)} and has: {has}.",
            param="scopes",
            code="insufficient_scope",
        )
    expires_at = request.expires_at
    if request.expires_in_days is not None:
        expires_at = datetime.now(UTC) + timedelta(days=request.expires_in_days)
    if expires_at is not None and expires_at <= datetime.now(UTC):
        raise Unprocessable("expires_at: must be in the future.", param="expires_at")
    row, key = _make(
        session,
        secret_key,
        tenant_id=principal.tenant_id,
        name=request.name,
        scopes=set(request.scopes),
        expires_at=expires_at,
        limits=_limits(principal, request.limits, settings),
    )
    audit.record(session, principal, "key.created", row.id, name=row.name, prefix=row.prefix, scopes=row.scopes)
    return row, key


def _limits(principal: Principal, requested: KeyLimits, settings: LimitSettings) -> dict[str, int]:
    """The requested limits over those of the principal's key, so that no key can create one with higher limits."""
    own = limits_of(principal, settings)
    wanted = requested.model_dump(exclude_none=True)
    for name, value in wanted.items():
        most = getattr(own, name)
        if most and (value == 0 or value > most):
            raise Unprocessable(
                f"limits.{name}: must be from 1 to {most:,}, the limit of your own key.", param=f"limits.{name}"
            )
    return {**principal.limits, **wanted}


def _make(session: Session, secret_key: str, *, scopes: Collection[Scope], **columns: Any) -> tuple[ApiKey, str]:
    """The row of a new key, and the key itself, which is not stored."""
    prefix = secrets.token_hex(6)
    key = f"{KEY_PREFIX}{prefix}_{secrets.token_urlsafe(32)}"
    digest = key_digest(secret_key, key)
    row = ApiKey(id=new_id("key"), prefix=prefix, digest=digest, scopes=sorted(scopes), **columns)
    repository.add(session, row)
    session.add(KeyUsage(key_id=row.id))
    return row, key


def find(session: Session, tenant_id: str, key_id: str) -> ApiKey:
    """The key, even if revoked or expired.

    Raises:
        NotFound: the tenant has no such key.
    """
    key = repository.get(session, tenant_id, key_id)
    if key is None:
        raise NotFound(f"No API key {key_id!r}.", param="id")
    return key


def revoke(session: Session, principal: Principal, key_id: str) -> None:
    """Revokes the key as of the end of the transaction. Safe to repeat.

    Raises:
        NotFound: the tenant has no such key.
        Conflict: it is the last one that can manage keys: `last_admin_key`.
    """
    advisory_lock(session, f"keys/{principal.tenant_id}")  # of two admin keys, only one may revoke the other
    key = find(session, principal.tenant_id, key_id)
    if repository.is_live_admin(session, key) and not repository.has_live_admin_beside(session, key):
        raise Conflict(
            f"{key_id} is your tenant's last key with the scope `admin`; create another one first.",
            code="last_admin_key",
        )
    if repository.revoke(session, key):
        audit.record(session, principal, "key.revoked", key.id, name=key.name, prefix=key.prefix)
