"""All SQL for managing keys."""

from collections.abc import Sequence

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from service import ids
from service.auth.principal import Scope
from service.auth.repository import lives
from service.auth.tables import ApiKey, Tenant
from service.db.pagination import paginate


def tenant_by_name(session: Session, name: str) -> Tenant | None:
    return session.scalar(select(Tenant).where(Tenant.name == name))


def add(session: Session, key: ApiKey) -> None:
    session.add(key)
    session.flush()
    session.refresh(key)


def get(session: Session, tenant_id: str, key_id: str) -> ApiKey | None:
    if not ids.is_id("key", key_id):
        return None
    return session.scalar(select(ApiKey).where(ApiKey.id == key_id, ApiKey.tenant_id == tenant_id))


def page(session: Session, tenant_id: str, *, after: str | None, limit: int) -> tuple[list[ApiKey], bool]:
    """Of the tenant's keys, revoked ones too, newest first."""
    keys = select(ApiKey).where(ApiKey.tenant_id == tenant_id)
    return paginate(session, keys, ApiKey.id, after=after, limit=limit)


def is_live_admin(session: Session, key: ApiKey) -> bool:
    """Whether it can create and revoke keys."""
    return session.scalar(select(ApiKey.id).where(ApiKey.id == key.id, *_live_admin())) is not None


def has_live_admin_beside(session: Session, key: ApiKey) -> bool:
    """Whether another key of its tenant can."""
    others = select(ApiKey.id).where(ApiKey.tenant_id == key.tenant_id, ApiKey.id != key.id, *_live_admin())
    return session.scalar(others.limit(1)) is not None


def _live_admin() -> tuple[ColumnElement[bool], ...]:
    return lives(), ApiKey.scopes.contains([Scope.ADMIN.value])


def revoke(session: Session, key: ApiKey) -> bool:
    """False if it was revoked before."""
    revoked = update(ApiKey).where(ApiKey.id == key.id, ApiKey.revoked_at.is_(None))
    changed = session.scalar(revoked.values(revoked_at=func.clock_timestamp()).returning(ApiKey.id))
    return changed is not None


def of_all_tenants(session: Session, tenant_name: str | None) -> Sequence[tuple[ApiKey, str]]:
    """For an operator: (key, tenant's name) of all keys, or of one tenant's, oldest first."""
    keys = select(ApiKey, Tenant.name).join(Tenant, Tenant.id == ApiKey.tenant_id).order_by(Tenant.name, ApiKey.id)
    if tenant_name is not None:
        keys = keys.where(Tenant.name == tenant_name)
    return [(row[0], row[1]) for row in session.execute(keys)]


def by_prefix_or_id(session: Session, value: str) -> ApiKey | None:
    """For an operator: the key of any tenant."""
    return session.scalar(select(ApiKey).where(or_(ApiKey.prefix == value, ApiKey.id == value)))
