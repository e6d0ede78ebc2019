"""All SQL on tenants and keys."""

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from service import ids
from service.tenants.caller import Scope
from service.tenants.tables import ApiKey, Tenant

_USE_EVERY = timedelta(minutes=1)


def is_id(value: str) -> bool:
    return ids.is_id("key", value)


def tenant_by_name(session: Session, name: str) -> Tenant | None:
    return session.scalar(select(Tenant).where(Tenant.name == name))


def live_key(session: Session, prefix: str) -> ApiKey | None:
    return session.scalar(select(ApiKey).where(ApiKey.prefix == prefix, ApiKey.revoked_at.is_(None)))


def add(session: Session, key: ApiKey) -> None:
    session.add(key)
    session.flush()
    session.refresh(key)


def get(session: Session, tenant_id: str, key_id: str) -> ApiKey | None:
    if not is_id(key_id):
        return None
    return session.scalar(select(ApiKey).where(ApiKey.id == key_id, ApiKey.tenant_id == tenant_id))


def page(session: Session, tenant_id: str, *, after: str | None, limit: int) -> Sequence[ApiKey]:
    """At most `limit` of the tenant's keys, revoked ones too, newest first, older than `after`."""
    keys = select(ApiKey).where(ApiKey.tenant_id == tenant_id)
    if after is not None:
        keys = keys.where(ApiKey.id < after)
    return session.scalars(keys.order_by(ApiKey.id.desc()).limit(limit)).all()


def lock_keys(session: Session, tenant_id: str) -> None:
    """Until the transaction ends, no other one revokes a key of the tenant."""
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"keys/{tenant_id}", 0))))


def is_live_admin(session: Session, key: ApiKey) -> bool:
    """Whether it can make and revoke keys."""
    return session.scalar(select(ApiKey.id).where(ApiKey.id == key.id, *_live_admin())) is not None


def has_live_admin_beside(session: Session, key: ApiKey) -> bool:
    """Whether another key of its tenant can."""
    others = select(ApiKey.id).where(ApiKey.tenant_id == key.tenant_id, ApiKey.id != key.id, *_live_admin())
    return session.scalar(others.limit(1)) is not None


def _live_admin() -> tuple[ColumnElement[bool], ...]:
    lasts = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > func.clock_timestamp())
    return ApiKey.revoked_at.is_(None), lasts, ApiKey.scopes.contains([Scope.ADMIN.value])


def revoke(session: Session, key: ApiKey) -> bool:
    """False where it was revoked before."""
    revoked = update(ApiKey).where(ApiKey.id == key.id, ApiKey.revoked_at.is_(None))
    changed = session.scalar(revoked.values(revoked_at=func.clock_timestamp()).returning(ApiKey.id))
    return changed is not None


def note_use(session: Session, key_id: str) -> None:
    """Writes that the key is used now, unless that was written within a minute, or the row is held by someone."""
    is_old = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at <= func.clock_timestamp() - _USE_EVERY)
    free = select(ApiKey.id).where(ApiKey.id == key_id, is_old).with_for_update(key_share=True, skip_locked=True)
    session.execute(
        update(ApiKey)
        .where(ApiKey.id.in_(free))
        .values(last_used_at=func.clock_timestamp())
        .execution_options(synchronize_session=False)
    )


def of_all_tenants(session: Session, tenant_name: str | None) -> Sequence[tuple[ApiKey, str]]:
    """For an operator: (key, tenant's name) of all keys, or of one tenant's, oldest first."""
    keys = select(ApiKey, Tenant.name).join(Tenant, Tenant.id == ApiKey.tenant_id).order_by(Tenant.name, ApiKey.id)
    if tenant_name is not None:
        keys = keys.where(Tenant.name == tenant_name)
    return [(row[0], row[1]) for row in session.execute(keys)]


def by_prefix_or_id(session: Session, value: str) -> ApiKey | None:
    """For an operator: the key of any tenant."""
    return session.scalar(select(ApiKey).where(or_(ApiKey.prefix == value, ApiKey.id == value)))
