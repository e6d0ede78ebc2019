"""What a tenant's admin does with its keys."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy.orm import Session

from service.audit import service as audit
from service.errors import Conflict, Forbidden, NotFound, Unprocessable
from service.limits import quotas
from service.settings import LimitSettings
from service.tenants import repository
from service.tenants.caller import Caller
from service.tenants.schemas import KeyLimits, KeyRequest
from service.tenants.service import make_key
from service.tenants.tables import ApiKey


def create(
    session: Session, caller: Caller, request: KeyRequest, settings: LimitSettings, secret_key: str
) -> tuple[ApiKey, str]:
    """A new key of the caller's tenant: its row, and the key itself. It can do nothing that the caller's key cannot.

    Raises:
        Forbidden: the caller's key has not all the scopes.
        Unprocessable: it ends in the past, or has a limit above the caller's; `param` names the field.
    """
    lacking = sorted(set(request.scopes) - caller.scopes)
    if lacking:
        has = ", ".join(sorted(caller.scopes))
        raise Forbidden(
            f"scopes: a key can give only scopes that it has, and yours lacks {', '.join(lacking)}; it has: {has}.",
            param="scopes",
            code="insufficient_scope",
        )
    expires_at = request.expires_at
    if request.expires_in_days is not None:
        expires_at = datetime.now(UTC) + timedelta(days=request.expires_in_days)
    if expires_at is not None and expires_at <= datetime.now(UTC):
        raise Unprocessable("expires_at: must be in the future.", param="expires_at")
    row, key = make_key(
        session,
        tenant_id=caller.tenant_id,
        name=request.name,
        secret_key=secret_key,
        scopes=set(request.scopes),
        expires_at=expires_at,
        limits=_limits(caller, request.limits, settings),
    )
    audit.record(session, caller, "key.created", row.id, name=row.name, prefix=row.prefix, scopes=row.scopes)
    return row, key


def _limits(caller: Caller, asked: KeyLimits, settings: LimitSettings) -> Mapping[str, int]:
    """Those of the caller's key, but for what was asked for: else a key could have another one made with more."""
    own = quotas.of_key(caller, settings)
    wanted = asked.model_dump(exclude_none=True)
    for name, value in wanted.items():
        most = getattr(own, name)
        if most and (value == 0 or value > most):
            raise Unprocessable(
                f"limits.{name}: must be from 1 to {most:,}, which is the limit of your key.", param=f"limits.{name}"
            )
    return {**caller.limits, **wanted}


def find(session: Session, tenant_id: str, key_id: str) -> ApiKey:
    """The key, also one that is revoked or has expired.

    Raises:
        NotFound: the tenant has none of this id.
    """
    key = repository.get(session, tenant_id, key_id)
    if key is None:
        raise NotFound(f"No API key {key_id!r}.", param="id")
    return key


def page(session: Session, tenant_id: str, *, after: str | None, limit: int) -> tuple[Sequence[ApiKey], bool]:
    """A page of the tenant's keys, newest first, and whether there are more."""
    found = repository.page(session, tenant_id, after=after, limit=limit + 1)
    return found[:limit], len(found) > limit


def revoke(session: Session, caller: Caller, key_id: str) -> None:
    """From the end of the transaction the key opens nothing. Repeating changes nothing.

    Raises:
        NotFound: the tenant has no such key.
        Conflict: it is the last one that can make and revoke keys: `last_admin_key`.
    """
    repository.lock_keys(session, caller.tenant_id)
    key = find(session, caller.tenant_id, key_id)
    if repository.is_live_admin(session, key) and not repository.has_live_admin_beside(session, key):
        raise Conflict(
            f"{key_id} is the last key of your tenant with the scope `admin`; make another one first.",
            code="last_admin_key",
        )
    if repository.revoke(session, key):
        audit.record(session, caller, "key.revoked", key.id, name=key.name, prefix=key.prefix)
