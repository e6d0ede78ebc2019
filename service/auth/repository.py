"""All SQL of authentication."""

from datetime import timedelta
from typing import Final

from sqlalchemy import Boolean, ColumnElement, func, literal_column, or_, select, update
from sqlalchemy.orm import Session

from service.auth.tables import ApiKey

USE_INTERVAL = timedelta(minutes=1)  # how exactly the last use of a key is known

# Neither revoked nor expired, by the clock of the database.
_IS_LIVE = """
    (api_keys.revoked_at IS NULL AND (api_keys.expires_at IS NULL OR api_keys.expires_at > clock_timestamp()))
"""

# The live key of that prefix, for a WITH of the one statement of a quick answer. `is_noted`: its use need not be recorded.
LIVE_KEY: Final = f"""
    SELECT id AS key_id, tenant_id, digest, scopes, limits,
        coalesce(last_used_at > clock_timestamp() - interval '{USE_INTERVAL.total_seconds():.0f} seconds', false) AS is_noted
    FROM api_keys WHERE prefix = %(prefix)s AND {_IS_LIVE}
"""


def lives() -> ColumnElement[bool]:
    """Whether a key opens anything: `_IS_LIVE` as a condition."""
    return literal_column(_IS_LIVE, Boolean)


def live_key(session: Session, prefix: str) -> ApiKey | None:
    return session.scalar(select(ApiKey).where(ApiKey.prefix == prefix, lives()))


def is_live(session: Session, key_id: str) -> bool:
    return session.scalar(select(ApiKey.id).where(ApiKey.id == key_id, lives())) is not None


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
