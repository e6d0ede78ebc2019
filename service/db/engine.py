"""Engine, sessions and the declarative base. Tables stand in `tables.py` beside the domain that owns them."""

from collections.abc import AsyncIterator, Callable
from datetime import datetime
from functools import partial
from typing import Annotated, Any, TypeVar

from anyio import CancelScope
from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import DateTime, Engine, MetaData, create_engine, func, make_url
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from service.settings import DatabaseSettings
from service.shares import Share


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: DateTime(timezone=True), dict[str, Any]: JSONB}  # noqa: RUF012


class CreatedAt:
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


Sessions = sessionmaker[Session]
Found = TypeVar("Found")


# Either side notices within a minute that the other end of a connection has vanished.
KEEPALIVE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
_SERVER_KEEPALIVE = "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3"


_POOL_SECONDS = 10.0  # requests have a reservation, and do not wait here; what has none is told soon


def make_engine(settings: DatabaseSettings, *, idle_in_transaction_seconds: float = 0) -> Engine:
    """`idle_in_transaction_seconds`: the server ends a transaction that was idle for so long, so that a process that was stopped
    or cut off does not keep its row locks for ever; 0: never."""
    return create_engine(
        settings.url,
        pool_size=settings.pool_size,
        max_overflow=settings.pool_size,
        pool_timeout=_POOL_SECONDS,
        pool_pre_ping=True,
        hide_parameters=True,  # errors are logged and traced, and values may be user data
        connect_args=connection_arguments(idle_in_transaction_seconds),
    )


def connection_arguments(idle_in_transaction_seconds: float = 0, planned: str = "") -> dict[str, Any]:
    """For psycopg: as `make_engine` has it; `planned`: settings of how the connection's statements are planned."""
    options = f"{_SERVER_KEEPALIVE} -c idle_in_transaction_session_timeout={round(idle_in_transaction_seconds * 1000)} {planned}"
    return {"connect_timeout": 10, "options": options, **KEEPALIVE}


def libpq_url(url: str) -> str:
    """The URL for psycopg itself, for a connection outside the pool: to listen, or to hold a lock."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def make_sessions(engine: Engine) -> Sessions:
    return sessionmaker(engine, expire_on_commit=False)


def is_away(error: DBAPIError) -> bool:
    """Whether the database cannot answer just now; any other error is the fault of the statement.

    Class 08 is a lost connection, 57P a server that stops or starts, 53 one without disk space, memory or a free connection; a
    connection that was not made has no state.
    """
    if error.connection_invalidated:
        return True
    state = getattr(error.orig, "sqlstate", None)
    if state is None:
        return isinstance(error, OperationalError | InterfaceError)
    return bool(state.startswith(("08", "57P", "53")))


_CONNECTION_WAIT_SECONDS = 30.0


async def _reserve_connection(request: Request) -> Callable[[], None]:
    """Waits for one of as many reservations as there are connections; what is returned gives it back.

    A request uses several threads one after the other and keeps its connection in between: with more requests than connections,
    those without one would occupy all the threads that those with one wait for.

    Raises:
        UsedUp: none became free within half a minute.
    """
    state = request.app.state
    connections: Share = state.shares.connections
    # Before a key has been looked up, its tenant is known if an earlier request was authenticated by it.
    tenant = getattr(request.state, "tenant_id", None) or state.callers.tenant_of(request)
    await connections.wait(tenant, _CONNECTION_WAIT_SECONDS, is_next=_keeps_its_turn(request))
    return partial(connections.give_back, tenant)


def _keeps_its_turn(request: Request) -> bool:
    """True once for a request that was admitted before its body was read: it has waited, and does not go to the end again."""
    keeps: bool = getattr(request.state, "keeps_its_turn", False)
    request.state.keeps_its_turn = False
    return keeps


async def run_with_connection(request: Request, work: Callable[[], Found]) -> Found:
    """Runs `work` in a thread as soon as a connection is free for it, and returns its result.

    Raises:
        UsedUp: no connection became free within half a minute.
    """
    give_back = await _reserve_connection(request)
    try:
        return await run_in_threadpool(work)
    finally:
        give_back()


async def release_connection(session: Session) -> None:
    """Commits and returns the connection to the pool, for a request that goes on without one."""
    if session.in_transaction():
        await run_in_threadpool(session.commit)
    session.info.pop("give_back")()


async def _request_session(request: Request) -> AsyncIterator[Session]:
    sessions: Sessions = request.app.state.sessions
    session = sessions()
    session.info["give_back"] = await _reserve_connection(request)
    try:
        yield session
        if session.in_transaction():
            await run_in_threadpool(session.commit)
    finally:
        with CancelScope(shield=True):
            if session.in_transaction():
                await run_in_threadpool(session.close)
            if "give_back" in session.info:
                session.info.pop("give_back")()


# Commits when the route function returns and before the response is sent: a client is never told of what was not kept.
SessionDep = Annotated[Session, Depends(_request_session, scope="function")]
