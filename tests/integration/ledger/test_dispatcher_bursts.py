"""Many notifications at once: the dispatcher gathers them."""

import time
from collections.abc import Sequence

import pytest
import redis
from support.ledger_world import LedgerWorld, wait_until
from test_dispatcher import SOON, dispatching, led

from service.background.dispatcher import QUEUE, Dispatcher


def test_a_burst_of_jobs_is_one_pass(world: LedgerWorld, broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[float] = []
    work = Dispatcher.work

    def counted(dispatcher: Dispatcher, payloads: Sequence[str]) -> float:
        passes.append(time.monotonic())
        return work(dispatcher, payloads)

    monkeypatch.setattr(Dispatcher, "work", counted)
    monkeypatch.setattr(Dispatcher, "rest_seconds", 2.0)
    with redis.Redis.from_url(broker_url) as client, dispatching(world, broker_url):
        client.delete(QUEUE)
        led(world)
        for _ in range(8):
            world.job()
            time.sleep(0.1)  # longer than a pass
        wait_until(lambda: client.llen(QUEUE) == 8, SOON, "a message for each")
    assert len(passes) <= 4
