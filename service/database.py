"""Engine, sessions and the declarative base. Tables stand in `tables.py` beside the domain that owns them."""

from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Annotated, Any, TypeVar

from anyio import CancelScope, CapacityLimiter, fail_after
from anyio.lowlevel import RunVar
from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import DateTime, Engine, MetaData, create_engine, func, make_url
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from service.settings import DatabaseSettings


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


# A connection whose other end has gone without a word is found out within a minute, by either side.
KEEPALIVE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
_SERVERKEEPALIVE = "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3"


def make_engine(settings: DatabaseSettings, *, idle_in_transaction_seconds: float = 0) -> Engine:
    """`idle_in_transaction_seconds`: after so long a transaction that stands still is ended by the server, so that a process that
    was stopped or cut off holds no row for ever; 0: never."""
    options = f"{_SERVERKEEPALIVE} -c idle_in_transaction_session_timeout={round(idle_in_transaction_seconds * 1000)}"
    return create_engine(
        settings.url,
        pool_size=settings.pool_size,
        max_overflow=settings.pool_size,
        pool_pre_ping=True,
        hide_parameters=True,  # an error is logged and traced, and values may be of a user's data
        connect_args={"connect_timeout": 10, "options": options, **KEEPALIVE},
    )


def libpq_url(url: str) -> str:
    """What psycopg takes, for a connection of one's own: to listen, or to hold a lock."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def make_sessions(engine: Engine) -> Sessions:
    return sessionmaker(engine, expire_on_commit=False)


def is_away(error: DBAPIError) -> bool:
    """Whether the database does not answer; any other error is a fault of what was asked of it.

    Class 08 is a lost connection, 57P a server that stops or starts; a connection that was not made has no state.
    """
    if error.connection_invalidated:
        return True
    state = getattr(error.orig, "sqlstate", None)
    if state is None:
        return isinstance(error, OperationalError | InterfaceError)
    return bool(state.startswith(("08", "57P")))


class Busy(Exception):
    """All connections were in use for half a minute."""


_TURN_SECONDS = 30.0
_turns: RunVar[CapacityLimiter] = RunVar("turns")


def _limiter(request: Request) -> CapacityLimiter:
    """As many turns as there are connections. A request takes several threads one after the other, and keeps its connection in
    between: with more requests than connections, those that have none would hold all threads that those with one wait for."""
    try:
        return _turns.get()
    except LookupError:
        limiter = CapacityLimiter(2 * request.app.state.settings.database.pool_size)
        _turns.set(limiter)
        return limiter


async def _take_turn(request: Request, borrower: object) -> CapacityLimiter:
    limiter = _limiter(request)
    try:
        with fail_after(_TURN_SECONDS):
            await limiter.acquire_on_behalf_of(borrower)
    except TimeoutError as error:
        raise Busy from error
    return limiter


async def in_turn(request: Request, work: Callable[[], Found]) -> Found:
    """What the work gives, done in a thread when there is a connection for it."""
    borrower = object()
    limiter = await _take_turn(request, borrower)
    try:
        return await run_in_threadpool(work)
    finally:
        limiter.release_on_behalf_of(borrower)


async def give_back(session: Session) -> None:
    """Commits, and lets others have the connection: for a request that goes on without it."""
    await run_in_threadpool(session.commit)
    session.info.pop("turns").release_on_behalf_of(session)


async def _request_session(request: Request) -> AsyncIterator[Session]:
    sessions: Sessions = request.app.state.sessions
    session = sessions()
    session.info["turns"] = await _take_turn(request, session)
    try:
        yield session
        if session.in_transaction():
            await run_in_threadpool(session.commit)
    finally:
        with CancelScope(shield=True):
            if session.in_transaction():
                await run_in_threadpool(session.close)
            if "turns" in session.info:
                session.info.pop("turns").release_on_behalf_of(session)


# Commits when the route function returns and before the answer is sent: a client never hears of what was not kept.
SessionDep = Annotated[Session, Depends(_request_session, scope="function")]
