"""Bringing a database to the newest revision.

A migration gives way: it waits a few seconds for a lock, lets everyone pass, and retries. One runs at a time in a database.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg.errors
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, pool, text
from sqlalchemy.exc import DBAPIError

from service.db.locks import Lock, lock_holder
from service.settings import DatabaseSettings

log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parents[2] / "migrations"
_UNMERGED = "0004"  # the last of the migrations that 0001 holds now: no other one may be called so
_LOCK_SECONDS = 5
_PAUSE_SECONDS = (1.0, 2.0, 5.0, 10.0)  # the last one is repeated
_NO_LOCK = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)


class MigrationError(Exception):
    """The database was not brought to the revision; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a database stands beside this version. `is_later`: at a revision of a later version, which keeps to additions."""

    current: str | None
    newest: str | None
    is_later: bool

    @property
    def is_behind(self) -> bool:
        return self.current != self.newest and not self.is_later


def alembic_config(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = url
    return config


def standing(connection: Connection) -> Standing:
    known = ScriptDirectory.from_config(alembic_config(""))
    current = MigrationContext.configure(connection).get_current_revision()
    is_later = current is not None and current not in {revision.revision for revision in known.walk_revisions()}
    return Standing(current, known.get_current_head(), is_later)


_OPEN_TRANSACTIONS = text("""
    SELECT format('session %s (%s, %s since %s s)', pid, coalesce(nullif(application_name, ''), 'no name'), state,
        round(extract(epoch FROM clock_timestamp() - xact_start)))
    FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
    ORDER BY xact_start LIMIT 3
""")


@contextmanager
def migrating(url: str) -> Iterator[Connection]:
    """A connection that may migrate: it alone has the database's migration lock, and waits for other locks a few seconds only.

    Raises:
        MigrationError: the database does not answer, has another encoding than UTF-8, or another migration runs.
    """
    # Without an encoding of its own, a connection to a database in SQL_ASCII gives bytes for every text.
    options = f"-c lock_timeout={_LOCK_SECONDS}s -c application_name=winnow-migrate -c client_encoding=UTF8"
    engine = create_engine(
        DatabaseSettings(url=url).url,
        poolclass=pool.NullPool,
        connect_args={"connect_timeout": 10, "options": options},
    )
    try:
        connection = engine.connect()
    except DBAPIError as error:
        raise MigrationError(f"the database does not answer: {_first_line(error)}") from error
    with connection:
        if (encoding := connection.scalar(text("SHOW server_encoding"))) != "UTF8":
            raise MigrationError(
                f"the database's encoding is {encoding}; create it with ENCODING 'UTF8' TEMPLATE template0"
            )
        if not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": Lock.MIGRATION.value}):
            holder = lock_holder(connection, Lock.MIGRATION) or "a session that has just ended"
            raise MigrationError(f"another migration runs: {holder} holds its lock. Nothing was done; let it end")
        connection.rollback()  # the lock is the session's, and Alembic begins its own transactions
        yield connection


def upgrade(
    url: str, revision: str = "head", *, patience_seconds: float = 300.0, notify: Callable[[str], None] = log.warning
) -> Standing:
    """Brings the database to the revision, each migration in its own transaction. Returns how it stood before.

    A migration that does not get its locks gives way and is retried until the patience is over; `notify` receives each
    reason. A database of a later version is left as it is.

    Raises:
        MigrationError: those before the one that failed are done, and that one has changed nothing.
    """
    config = alembic_config(url)
    deadline = time.monotonic() + patience_seconds
    with migrating(url) as connection:
        before = standing(connection)
        connection.rollback()
        if before.current == _UNMERGED:
            raise MigrationError(
                "the database was made by a development version, before its migrations became one; create a new one"
                " (of an embedded stack: remove its folder, .winnow)"
            )
        if before.is_later:
            return before
        config.attributes["connection"] = connection
        attempt = 0
        while (waits_for := _try_upgrade(config, connection, revision)) is not None:
            pause = _PAUSE_SECONDS[min(attempt, len(_PAUSE_SECONDS) - 1)]
            if time.monotonic() + pause > deadline:
                raise MigrationError(
                    f"gave up after {attempt + 1} attempts: {waits_for}. End what holds it, and migrate again"
                )
            notify(f"{waits_for}; trying again in {pause:.0f} s")
            time.sleep(pause)
            attempt += 1
    return before


def _try_upgrade(config: Config, connection: Connection, revision: str) -> str | None:
    """None once it is done; else what it waits for."""
    try:
        command.upgrade(config, revision)
    except DBAPIError as error:
        if not isinstance(error.orig, _NO_LOCK):
            raise MigrationError(f"a migration failed: {_first_line(error)}") from error
        connection.rollback()
        sessions = connection.scalars(_OPEN_TRANSACTIONS).all()
        connection.rollback()
        statement = " ".join((error.statement or "").split())[:100]
        return f"no lock for `{statement}`; transactions that are open: {', '.join(sessions) or 'none any more'}"
    return None


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).strip().partition("\n")[0]
