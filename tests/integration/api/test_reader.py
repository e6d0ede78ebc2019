"""The connections of the quick answers: a database that is away, and comes back."""

import asyncio
import time
from contextlib import suppress
from pathlib import Path

from sqlalchemy import make_url
from support.waiting import PATIENCE

from service.db.reader import Away, Reader
from service.settings import DatabaseSettings
from service.shares import Share

NOWHERE = DatabaseSettings(url="postgresql://nobody@127.0.0.1:1/none")


def test_a_database_that_is_away_is_waited_for_by_few() -> None:
    """Each that tries waits a second for a connection; the others are told at once, also those whose turn comes meanwhile."""

    async def tried() -> tuple[list[bool], float]:
        reader = Reader(NOWHERE, Share("reads", 2, 1.0), Share("writes", 1, 1.0))
        await reader.open()
        started = time.monotonic()
        try:
            reads = (reader.rows("t", "SELECT 1", {}) for _ in range(50))
            found = await asyncio.gather(*reads, return_exceptions=True)
        finally:
            await reader.close()
        return [isinstance(each, Away) for each in found], time.monotonic() - started

    are_away, seconds = asyncio.run(tried())
    assert all(are_away)
    assert seconds < 10  # 25 turns would be 25 seconds


def test_a_database_that_comes_back_is_read_again(postgres_url: str, tmp_path: Path) -> None:
    """After an outage that is longer than the pool goes on connecting by itself."""
    where, sockets = make_url(postgres_url), tmp_path / "s"  # the folder of the server's sockets: not there at first
    url = where.set(query={"host": str(sockets)}).render_as_string(hide_password=False)

    async def can_read(reader: Reader) -> bool:
        with suppress(Away):
            return (await reader.rows("t", "SELECT 1 AS one", {}))[0].one == 1
        return False

    async def waited() -> float:
        reader = Reader(DatabaseSettings(url=url), Share("reads", 2, 1.0), Share("writes", 1, 1.0))
        await reader.open()
        try:
            away_until = time.monotonic() + 8
            while time.monotonic() < away_until:
                assert not await can_read(reader)
                await asyncio.sleep(0.1)
            sockets.symlink_to(str(where.query["host"]))
            back = time.monotonic()
            while not await can_read(reader):
                assert time.monotonic() - back < PATIENCE
                await asyncio.sleep(0.1)
            return time.monotonic() - back
        finally:
            await reader.close()

    assert asyncio.run(waited()) < 4
