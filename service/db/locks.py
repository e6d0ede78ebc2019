"""Advisory locks of PostgreSQL: `Lock` names those of the whole database, a text such as `keys/<tenant>` that of one object."""

from enum import IntEnum

from sqlalchemy import ColumnElement, Connection, func, select, text
from sqlalchemy.orm import Session


class Lock(IntEnum):
    MIGRATION = 0x6D696772617465  # "migrate"
    DISPATCHER = 0x77696E6E6F77  # "winnow"
    JOB_STARTER = 0x73746172746572  # "starter"
    SWEEPER = 0x73776565706572  # "sweeper"
    ARTIFACTS = 0x6172746966616374  # "artifact"; whoever creates units shares it


def advisory_lock(session: Session, lock: Lock | str, *, shared: bool = False) -> None:
    """Waits for the lock and holds it until the transaction ends; `shared` locks exclude only those that are not."""
    take = func.pg_advisory_xact_lock_shared if shared else func.pg_advisory_xact_lock
    session.execute(select(take(advisory_key(lock))))


def try_advisory_lock(session: Session, lock: Lock | str) -> bool:
    """As `advisory_lock`, but False at once where another transaction holds it."""
    return bool(session.scalar(select(func.pg_try_advisory_xact_lock(advisory_key(lock)))))


def advisory_key(lock: Lock | str | ColumnElement[str]) -> ColumnElement[int] | int:
    return lock.value if isinstance(lock, Lock) else func.hashtextextended(lock, 0)


_HOLDER = text("""
    SELECT format('session %s (user %s, %s, from %s)', a.pid, a.usename, coalesce(nullif(a.application_name, ''), 'no name'),
        coalesce(host(a.client_addr), 'this host'))
    FROM pg_locks l JOIN pg_stat_activity a USING (pid) JOIN pg_database d ON d.oid = l.database
    WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 AND d.datname = current_database()
        AND l.classid::bigint << 32 | l.objid::bigint = :key
""")


def lock_holder(connection: Connection | Session, lock: Lock) -> str | None:
    """A description of the database session that holds the lock."""
    return connection.execute(_HOLDER, {"key": lock.value}).scalar()
