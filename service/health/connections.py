"""Whether PostgreSQL allows for the connections of all processes: of those that run, or of those that are about to be started."""

import logging

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from service.db import budget
from service.db.engine import make_engine
from service.ledger.workers import recent_workers
from service.settings import DatabaseSettings, Settings

log = logging.getLogger(__name__)


def examine(engine: Engine, settings: Settings, *, workers: int, api_processes: int = 0) -> tuple[str, str]:
    """What there is and what it takes at most; and the remedy where that is more than PostgreSQL allows, else an empty text.

    `api_processes`: so many are about to be started beside those that run.
    """
    with engine.connect() as connection:
        room = budget.room(connection)
    database, processes = settings.database, room.api_processes + api_processes
    wanted = budget.most(database, api_processes=processes, workers=workers)
    detail = (
        f"PostgreSQL allows {room.allowed}, of which {room.used} are in use; {processes} API processes take up to"
        f" {budget.of_api_process(database)} each, {workers} workers up to {budget.of_worker(database)}, {wanted} in all with a"
        " few to spare"
    )
    return detail, budget.REMEDY.format(room.setting_for(wanted)) if wanted > room.allowed else ""


def warn_at_start(settings: Settings, api_processes: int) -> None:
    """Writes to the log where there may be too few. A database that is away is no reason not to start."""
    engine = make_engine(DatabaseSettings(url=settings.database.url, pool_size=1))
    try:
        with Session(engine) as session:
            alive = recent_workers(session, silent_seconds=settings.ledger.lease_seconds)
        workers = sum(worker.is_alive for worker in alive)
        detail, remedy = examine(engine, settings, workers=workers, api_processes=api_processes)
        if remedy:
            log.warning("database connections may run out: %s. To do: %s", detail, remedy)
    except SQLAlchemyError as error:
        log.warning("the budget of database connections was not checked (%s)", type(error).__name__)
    finally:
        engine.dispose()
