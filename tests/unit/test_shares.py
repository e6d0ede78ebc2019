"""What requests hold of what is shared: never more than there is, never more than a tenant's part, and tenants in turn."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi import Request
from hypothesis import given
from hypothesis import strategies as st

from service.db.engine import _keeps_its_turn
from service.settings import ShareSettings
from service.shares import Share, Shares, UsedUp


def take(share: Share, tenant: str) -> str:
    try:
        share.take(tenant)
    except UsedUp as error:
        return f"{'tenant' if error.of_tenant else 'all'} {error.most}"
    return "taken"


def test_a_tenant_takes_its_part_and_leaves_the_rest() -> None:
    share = Share("streams", 4, 0.5)
    assert [take(share, "a") for _ in range(3)] == ["taken", "taken", "tenant 2"]
    assert [take(share, "b") for _ in range(3)] == ["taken", "taken", "tenant 2"]
    assert take(share, "c") == "all 4"
    share.give_back("a")
    assert [take(share, tenant) for tenant in "bc"] == ["tenant 2", "taken"]


@pytest.mark.parametrize(("total", "fraction", "each"), [(1, 0.5, 1), (3, 0.5, 1), (10, 0.25, 2), (10, 1.0, 10)])
def test_a_part_is_one_at_least(total: int, fraction: float, each: int) -> None:
    assert Share("readers", total, fraction).each == each


def test_everything_that_is_shared_has_a_name_of_its_own() -> None:
    names = [share.name for share in Shares(ShareSettings(), connections=2)]
    assert len(names) == len(set(names)) == 9


def test_who_waits_is_served_in_turn_and_no_tenant_behind_anothers_queue() -> None:
    served: list[str] = []

    async def use(share: Share, tenant: str) -> None:
        async with share.waited_for(tenant):
            served.append(tenant)
            await asyncio.sleep(0)

    async def run() -> None:
        share = Share("readers", 1, 1.0)
        share.take("x")
        async with asyncio.TaskGroup() as group:
            for tenant in "aaaabbc":
                group.create_task(use(share, tenant))
                await asyncio.sleep(0)
            share.give_back("x")
        assert share.held == 0

    asyncio.run(run())
    assert "".join(served) == "abcabaa"


def test_who_is_next_goes_before_its_own_tenant_and_no_other() -> None:
    served: list[str] = []

    async def use(share: Share, tenant: str, name: str, *, is_next: bool) -> None:
        await share.wait(tenant, is_next=is_next)
        served.append(name)
        share.give_back(tenant)

    async def run() -> None:
        share = Share("connections", 1, 1.0)
        share.take("x")
        async with asyncio.TaskGroup() as group:
            for tenant, name in (("a", "a1"), ("a", "a2"), ("b", "b1"), ("a", "a3, admitted")):
                group.create_task(use(share, tenant, name, is_next="admitted" in name))
                await asyncio.sleep(0)
            share.give_back("x")

    asyncio.run(run())
    assert served.index("a3, admitted") < served.index("a1") < served.index("a2")
    assert served.index("b1") < served.index("a1"), "the other tenant waits for one of ours at most"


def test_a_request_that_was_admitted_for_its_body_is_next_once() -> None:
    plain, admitted = (Request({"type": "http", "headers": [], "state": {}}) for _ in range(2))
    admitted.state.keeps_its_turn = True
    assert [_keeps_its_turn(request) for request in (plain, admitted, admitted)] == [False, True, False]


def test_who_waits_too_long_is_told_whose_fault_it_is_and_holds_nothing() -> None:
    async def run() -> None:
        share = Share("connections", 2, 0.5)
        share.take("a")
        with pytest.raises(UsedUp) as own:
            await share.wait("a", 0.01)
        share.take("b")
        with pytest.raises(UsedUp) as everybodys:
            await share.wait("c", 0.01)
        assert (own.value.of_tenant, everybodys.value.of_tenant) == (True, False)
        share.give_back("a")
        share.give_back("b")
        assert (share.held, share._held.total(), share._waiting) == (0, 0, {})

    asyncio.run(run())


@given(cancelled=st.sets(st.integers(0, 5)), late=st.booleans())
def test_who_leaves_before_or_just_after_its_turn_keeps_nothing_from_the_others(
    cancelled: set[int], late: bool
) -> None:
    async def run() -> None:
        share = Share("readers", 1, 1.0)
        share.take("x")
        waiting = [asyncio.create_task(share.wait(f"tenant {i % 2}")) for i in range(6)]
        await asyncio.sleep(0)
        if late:
            share.give_back("x")
        for i in cancelled:
            waiting[i].cancel()
        if not late:
            share.give_back("x")
        remaining = {task: f"tenant {i % 2}" for i, task in enumerate(waiting) if i not in cancelled}
        await asyncio.gather(*(waiting[i] for i in cancelled), return_exceptions=True)
        while remaining:
            done, _ = await asyncio.wait(remaining, return_when=asyncio.FIRST_COMPLETED, timeout=5)
            assert len(done) == 1
            assert share.held == 1
            share.give_back(remaining.pop(done.pop()))
        assert (share.held, share._waiting) == (0, {})

    asyncio.run(run())


def test_loops_in_several_threads_share_one() -> None:
    share, inside, most = Share("connections", 3, 0.7), [], []
    lock = threading.Lock()

    async def use(tenant: str) -> None:
        async with share.waited_for(tenant):
            with lock:
                inside.append(tenant)
                most.append((len(inside), inside.count(tenant)))
            await asyncio.sleep(0.001)
            with lock:
                inside.remove(tenant)

    async def run(tenant: str) -> None:
        await asyncio.gather(*(use(tenant) for _ in range(40)))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda tenant: asyncio.run(run(tenant)), "aabc"))
    assert len(most) == 160
    assert max(of_all for of_all, _ in most) == 3
    assert max(of_one for _, of_one in most) == 2
    assert share.held == 0
