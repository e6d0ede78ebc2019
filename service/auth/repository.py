"""All SQL of authentication."""

from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Boolean, ColumnElement, delete, func, literal_column, or_, select, update
from sqlalchemy.orm import Session

from service.auth.principal import Principal
from service.auth.tables import ApiKey, BrowserSession, LoginLink

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


def is_live(session: Session, principal: Principal) -> bool:
    """Whether the key is valid, and the browser, if it was one, still logged in."""
    if principal.browser is not None:
        return key_of_browser(session, principal.browser) is not None
    return session.scalar(select(ApiKey.id).where(ApiKey.id == principal.key_id, lives())) is not None


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


def key_of_browser(session: Session, digest: bytes) -> ApiKey | None:
    """The live key that a browser has logged in with, in a session that has not ended."""
    opened = BrowserSession.expires_at > func.clock_timestamp()
    found = select(ApiKey).join(BrowserSession, BrowserSession.key_id == ApiKey.id)
    return session.scalar(found.where(BrowserSession.digest == digest, opened, lives()))


def end_browser_session(session: Session, digest: bytes) -> bool:
    """False if there was none."""
    ended = delete(BrowserSession).where(BrowserSession.digest == digest).returning(BrowserSession.key_id)
    return session.scalar(ended) is not None


def key_of_link(session: Session, digest: bytes) -> ApiKey | None:
    """The live key of a login link, which is used up by that: of two that use it at a time, one finds it."""
    used = delete(LoginLink).where(LoginLink.digest == digest, LoginLink.expires_at > func.clock_timestamp())
    key_id = session.scalar(used.returning(LoginLink.key_id))
    return None if key_id is None else session.scalar(select(ApiKey).where(ApiKey.id == key_id, lives()))


def remove_expired_logins(session: Session) -> None:
    for table in (BrowserSession, LoginLink):
        session.execute(delete(table).where(table.expires_at <= func.clock_timestamp()))


def remove_oldest_browser_sessions(session: Session, key_id: str, kept: int) -> None:
    """All but the newest of a key."""
    older = select(BrowserSession.digest).where(BrowserSession.key_id == key_id)
    older = older.order_by(BrowserSession.created_at.desc()).offset(kept)
    session.execute(delete(BrowserSession).where(BrowserSession.digest.in_(older)))


def time_after(session: Session, lifetime: timedelta) -> datetime:
    """The time after so long, by the clock of the database."""
    at: datetime = session.scalars(select(func.clock_timestamp() + lifetime)).one()
    return at
