"""All SQL of authentication."""

from datetime import timedelta
from typing import Final

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from service.auth.tables import ApiKey

USE_INTERVAL = timedelta(minutes=1)  # how exactly the last use of a key is known


def are_live() -> tuple[ColumnElement[bool], ...]:
    """The conditions under which a key opens anything: neither revoked nor expired, by the clock of the database."""
    lasts = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > func.clock_timestamp())
    return ApiKey.revoked_at.is_(None), lasts


def live_key(session: Session, prefix: str) -> ApiKey | None:
    return session.scalar(select(ApiKey).where(ApiKey.prefix == prefix, *are_live()))


# The live key of that prefix, for a WITH of the one statement of a quick answer. `is_noted`: its use need not be recorded.
LIVE_KEY: Final = """
    SELECT id AS key_id, tenant_id, digest, scopes, limits,
        coalesce(last_used_at > clock_timestamp() - interval '1 minute', false) AS is_noted
    FROM api_keys
    WHERE prefix = %(prefix)s AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > clock_timestamp())
"""


def is_live(session: Session, key_id: str) -> bool:
    return session.scalar(select(ApiKey.id).where(ApiKey.id == key_id, *are_live())) is not None


def record_use(session: Session, key_id: str) -> None:
    """Records that the key is used now, unless that was recorded within a minute or another transaction holds the row."""
    is_old = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at <= func.clock_timestamp() - USE_INTERVAL)
    free = select(ApiKey.id).where(ApiKey.id == key_id, is_old).with_for_update(key_share=True, skip_locked=True)
    session.execute(
        update(ApiKey)
        .where(ApiKey.id.in_(free))
        .values(last_used_at=func.clock_timestamp())
        .execution_options(synchronize_session=False)
    )
