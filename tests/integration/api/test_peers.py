"""What API processes count together, over a real broker; and what each does where the broker is away."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import redis
import uvloop
from support.servers import Broker, Servers

from service.auth.rate_limit import Rates
from service.http.errors import TooManyRequests
from service.ids import new_id
from service.peers import Peers
from service.shares import Share, UsedUp

NAME = "streams"


@pytest.fixture
def url(servers: Servers) -> str:
    return servers.broker.new_url()


@pytest.fixture
def broker() -> Iterator[Broker]:
    """One that only this test stops."""
    broker = Broker()
    yield broker
    broker.stop()


@asynccontextmanager
async def opened(url: str, count: int) -> AsyncIterator[list[Peers]]:
    """As many processes would have, here in one."""
    peers = [Peers(url) for _ in range(count)]
    for each in peers:
        await each.open()
    try:
        yield peers
    finally:
        for each in peers:
            await each.close()


async def allowed(rates: Rates, key: str, per_minute: int) -> bool:
    try:
        await rates.hit(key, per_minute)
    except TooManyRequests as error:
        return not 1 <= int(error.headers["Retry-After"]) <= 61
    return True


async def eventually(condition: "asyncio.Future[bool] | object", seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("per_minute", [1, 7, 150, 1_000])
def test_a_rate_holds_over_all_processes(url: str, per_minute: int) -> None:
    """In turns and at once: never more than the limit, and no less but for what others have counted ahead."""

    async def run() -> int:
        async with opened(url, 3) as peers:
            rates, key = [Rates(each) for each in peers], new_id("key")
            found = 0
            for _ in range(per_minute // 10 + 3):
                hits = (allowed(each, key, per_minute) for each in rates for _ in range(5))
                found += sum(await asyncio.gather(*hits))
            return found

    ahead = 2 * max(0, per_minute // 100 - 1)
    assert per_minute - ahead <= asyncio.run(run()) <= per_minute


def test_a_busy_key_costs_few_round_trips_and_is_told_what_it_has_used(url: str) -> None:
    async def run() -> tuple[int, int]:
        async with opened(url, 1) as (peers,):
            rates, key = Rates(peers), new_id("key")
            with redis.Redis.from_url(url) as client:
                before = client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0)
                for _ in range(1_000):
                    await rates.hit(key, 3_000)
                calls = client.info("commandstats")["cmdstat_evalsha"]["calls"] - before
            return calls, await rates.used(key, 3_000)

    calls, used = asyncio.run(run())
    assert used == 1_000
    assert calls < 50


def test_what_is_held_is_counted_over_all_processes(url: str) -> None:
    async def run() -> None:
        async with opened(url, 2) as peers, AsyncExitStack() as held:
            one, two = (Share(NAME, 4, 0.5, each) for each in peers)
            for share in (one, two):
                await held.enter_async_context(share.taken("a"))
            for share in (one, two):
                with pytest.raises(UsedUp) as used_up:
                    await held.enter_async_context(share.taken("a"))
                assert (used_up.value.of_tenant, used_up.value.most) == (True, 2)
            own = await held.enter_async_context(AsyncExitStack())
            await own.enter_async_context(one.taken("b"))
            await held.enter_async_context(two.taken("c"))
            with pytest.raises(UsedUp) as all_used_up:
                await held.enter_async_context(two.taken("b"))
            assert (all_used_up.value.of_tenant, all_used_up.value.most) == (False, 4)
            assert (one.held, two.held) == (2, 2), "who is refused holds nothing"
            await own.aclose()

            async def is_free() -> bool:
                try:
                    await held.enter_async_context(two.taken("b"))
                except UsedUp:
                    return False
                return True

            await eventually(is_free)

    asyncio.run(run())


def test_at_the_boundary_one_of_two_gets_the_last(url: str) -> None:
    async def run() -> None:
        async with opened(url, 2) as peers:
            shares = [Share(NAME, 1, 1.0, each) for each in peers]

            async def hold(share: Share) -> bool:
                try:
                    async with share.taken("a"):
                        await asyncio.sleep(0.3)
                except UsedUp:
                    return False
                return True

            for _ in range(5):
                assert sorted(await asyncio.gather(*map(hold, shares))) == [False, True]
                await asyncio.sleep(0.3)

    asyncio.run(run())


def test_what_a_killed_process_held_is_forgotten(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.peers._FORGET_SECONDS", 1)

    async def run() -> None:
        async with opened(url, 1) as (peers,):
            share, gone = Share(NAME, 1, 1.0, peers), Peers(url)
            of_gone = Share(NAME, 1, 1.0, gone)
            await gone.open()
            assert gone._task is not None
            gone._task.cancel()  # as where it is killed: it publishes nothing more
            of_gone.take("a")
            assert await gone.take(NAME, "a", 1, 1) == ""
            with pytest.raises(UsedUp):
                async with share.taken("a"):
                    pass

            async def is_free() -> bool:
                try:
                    async with share.taken("a"):
                        return True
                except UsedUp:
                    return False

            await eventually(is_free)
            await gone.close()

    asyncio.run(run())


@pytest.mark.parametrize("how", ["stopped", "frozen"])
def test_where_the_broker_is_away_each_counts_for_itself_without_waiting(
    broker: Broker, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        alone: list[bool] = []
        peers = Peers(broker.url)
        peers.on_alone = alone.append
        await peers.open()
        assert alone == [False]
        rates, share, key = Rates(peers), Share(NAME, 1, 1.0, peers), new_id("key")
        with broker.away() if how == "stopped" else broker.frozen():
            started = time.monotonic()
            assert [await allowed(rates, key, 3) for _ in range(5)] == [True] * 3 + [False] * 2
            async with share.taken("a"):
                assert share.held == 1
            assert time.monotonic() - started < 3.0
            assert alone == [False, True]
            started = time.monotonic()
            for _ in range(200):
                await rates.hit(new_id("key"), 10)
            assert time.monotonic() - started < 3.0, "nobody waits for it again"

        async def is_back() -> bool:
            return alone == [False, True, False]

        await eventually(is_back)
        assert await allowed(rates, key, 3), "it counts with the others again"
        await peers.close()

    with caplog.at_level(logging.INFO, logger="service.peers"):
        asyncio.run(run())
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_where_it_is_away_at_the_start_nothing_waits(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with opened("redis://127.0.0.1:1/0", 1) as (peers,):
            rates, key = Rates(peers), new_id("key")
            assert [await allowed(rates, key, 1) for _ in range(2)] == [True, False]
            assert await rates.used(key, 1) == 1

    asyncio.run(run())
    assert [record.levelname for record in caplog.records if record.name == "service.peers"] == ["WARNING"]


def test_a_process_that_stops_is_not_kept_by_the_broker(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of whatever it was telling the others."""
    for name in ("_BEAT_SECONDS", "_SOON_SECONDS"):
        monkeypatch.setattr(f"service.peers.{name}", 0.001)

    async def run() -> None:
        for number in range(40):
            peers = Peers(url)
            share = Share(NAME, 9, 1.0, peers)
            await peers.open()
            async with share.taken("a"):
                await asyncio.sleep(0.0005 * number)
            closing = asyncio.ensure_future(peers.close())
            done, _ = await asyncio.wait({closing}, timeout=10)
            assert done, f"{number}: it does not end"
            await closing

    uvloop.run(run())
