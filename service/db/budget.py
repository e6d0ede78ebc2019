"""The budget of database connections: what one process takes at most, and whether PostgreSQL allows for all of them."""

from dataclasses import dataclass

from sqlalchemy import Connection, text

from service.settings import DatabaseSettings
from service.shares import READS, WRITES

LISTENER = "winnow notifications"
"""The name of the connection that every API process has one of."""

# Dispatcher, starter of jobs, sweeper, notifications and sender of webhooks, each to listen and to lead; the engines of the first
# three and of the metrics (2 each), and the sender's (4). Most are there only in the process that leads, or under load.
_BESIDE_REQUESTS = 5 + 4 * 2 + 4

_SPARE = 10  # for the operator's commands, and what connects anew before the old connection is gone


def of_api_process(settings: DatabaseSettings) -> int:
    """At most: its requests', the reader's, and those of what runs beside."""
    return 2 * settings.pool_size + READS + WRITES + _BESIDE_REQUESTS


def of_worker(settings: DatabaseSettings) -> int:
    return 2 * settings.pool_size


def most(settings: DatabaseSettings, *, api_processes: int, workers: int) -> int:
    """Of so many processes together, and some to spare."""
    return api_processes * of_api_process(settings) + workers * of_worker(settings) + _SPARE


@dataclass(frozen=True, slots=True)
class Room:
    """`allowed`: connections that PostgreSQL gives to all but superusers; `setting`: its `max_connections`; `api_processes`:
    those that run, on all hosts."""

    allowed: int
    setting: int
    used: int
    api_processes: int

    def setting_for(self, wanted: int) -> int:
        """What `max_connections` has to be for so many."""
        return wanted + self.setting - self.allowed


_ROOM = text("""
    SELECT current_setting('max_connections')::int AS setting,
        current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
            - coalesce(current_setting('reserved_connections', true), '0')::int AS allowed,
        count(*) FILTER (WHERE backend_type = 'client backend') AS used,
        count(*) FILTER (WHERE application_name = :listener AND datname = current_database()) AS api_processes
    FROM pg_stat_activity
""")


def room(connection: Connection) -> Room:
    return Room(**connection.execute(_ROOM, {"listener": LISTENER}).one()._mapping)


REMEDY = (
    "set `max_connections` of PostgreSQL to {} or more, or lower WINNOW_DATABASE__POOL_SIZE or the number of processes"
)
