"""Reads and writes of one statement, in the event loop and on connections of their own: without a thread, a session or more
than the statement's own transaction."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, LiteralString, NamedTuple

import orjson
from psycopg import AsyncConnection, Error
from psycopg.rows import namedtuple_row
from psycopg.types.json import set_json_loads
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from service.db.engine import connection_arguments, libpq_url
from service.settings import DatabaseSettings
from service.shares import Share, UsedUp

_TURN_SECONDS = 30.0
_WAIT_SECONDS = 1.0  # for a connection: whoever waits has had its turn, so one is free, or the database away
_AWAY_SECONDS = 1.0  # after a failure, in which nobody tries again: each would wait
_GIVE_UP_SECONDS = 2.0  # of connecting again, ever more slowly; the next request begins anew


async def _configure(connection: AsyncConnection[Any]) -> None:
    set_json_loads(orjson.loads, connection)


class Away(Exception):
    """Nothing can be done here now, or what became of it is not known; the usual way may still do it, and says what is wrong."""


class Reader:
    """Of one event loop: the one that opened it. A statement is planned once for each connection, which takes longer than
    running it."""

    def __init__(self, settings: DatabaseSettings, reads: Share, writes: Share) -> None:
        """Those that write may wait for locks, so they have connections for themselves."""
        self._reads, self._writes = reads, writes
        connections = reads.total + writes.total
        self._loop: asyncio.AbstractEventLoop | None = None
        self._away_until = 0.0
        self.around: Callable[[str], AbstractContextManager[object]] = (
            nullcontext  # each statement: a span, where they are made
        )
        self._pool: AsyncConnectionPool[AsyncConnection[NamedTuple]] = AsyncConnectionPool(
            libpq_url(settings.url),
            kwargs={
                **connection_arguments(planned="-c plan_cache_mode=force_generic_plan -c jit=off"),
                "autocommit": True,
                "prepare_threshold": 0,
                "row_factory": namedtuple_row,
            },
            configure=_configure,
            min_size=connections,
            max_size=connections,
            timeout=_WAIT_SECONDS,
            reconnect_timeout=_GIVE_UP_SECONDS,
            open=False,
        )

    async def open(self) -> None:
        await self._pool.open(wait=False)
        self._loop = asyncio.get_running_loop()

    async def close(self) -> None:
        self._loop = None
        await self._pool.close()

    async def rows(self, tenant: str, statement: LiteralString, values: Mapping[str, Any]) -> Sequence[Any]:
        """The rows of the statement; the tenant waits with its own and not with all others.

        Raises:
            Away: the reader is not open in this event loop, or the database does not answer.
        """
        return await self._run(self._reads, tenant, statement, values)

    async def write(self, tenant: str, statement: LiteralString, values: Mapping[str, Any]) -> Sequence[Any]:
        """As `rows`, of a statement that writes. Where the connection is lost, it may have taken effect all the same."""
        return await self._run(self._writes, tenant, statement, values)

    async def _run(
        self, share: Share, tenant: str, statement: LiteralString, values: Mapping[str, Any]
    ) -> Sequence[Any]:
        loop = self._here()
        try:
            await share.wait(tenant, _TURN_SECONDS)
        except UsedUp as error:
            raise Away from error
        try:
            self._here()  # it may have turned out to be away meanwhile
            async with self._pool.connection() as connection:
                with self.around(statement):
                    return await (await connection.execute(statement, values)).fetchall()
        except (Error, PoolTimeout) as error:
            self._away_until = loop.time() + _AWAY_SECONDS
            raise Away from error
        finally:
            share.give_back(tenant)

    def _here(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is not loop or loop.time() < self._away_until:
            raise Away
        return loop
