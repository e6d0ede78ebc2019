"""The broker is stopped, frozen, or forgets: a job waits for nothing but the next sweep, and a request not at all."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import redis
from scenario import Told, frozen, held_job, survived
from support.servers import Broker, Servers
from undisturbed import Undisturbed
from world import JOB, LEDGER, World

from service.background.dispatcher import QUEUE

pytestmark = pytest.mark.slow


def _post_at_once(world: World, pool: str, target: str) -> str:
    """The job of all scenarios, by one request that is answered before a lease is over."""
    body = {**JOB, "pool": pool, "target": target}
    answer = world.client.post("/v1/selection-jobs", json=body, timeout=LEDGER.lease_seconds)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


@pytest.mark.parametrize("away", [Broker.away, Broker.frozen], ids=["stopped", "frozen"])
def test_jobs_survive_a_broker_that_is_away(
    pair: World,
    servers: Servers,
    undisturbed: Undisturbed,
    record_property: Told,
    away: Callable[[Broker], AbstractContextManager[None]],
) -> None:
    job_id = held_job(pair)
    job = pair.get(job_id)
    with away(servers.broker):
        record_property("fault", "broker away while a job runs and another is posted")
        beside = _post_at_once(pair, job["pool"], job["target"])
        pair.faults.release()
        # What holds the claim drains the ledger without a message.
        pair.until("it goes on without a broker", lambda: pair.events(job_id, "unit.succeeded")[2:])
    survived(pair, undisturbed, job_id, beside)


def test_a_job_that_was_posted_before_there_was_a_broker(
    pair: World, servers: Servers, undisturbed: Undisturbed, record_property: Told
) -> None:
    for process in pair.processes:
        process.stop()
    with servers.broker.away():
        record_property("fault", "broker away from the start")
        pair.revive()
        job_id = pair.submit()
        pair.until("the dispatcher has missed it", lambda: "the broker is away" in pair.api.log.read_text())
    survived(pair, undisturbed, job_id)


def test_messages_that_were_flushed_are_sent_again(
    pair: World, undisturbed: Undisturbed, record_property: Told
) -> None:
    with redis.Redis.from_url(pair.settings.broker.url) as queue:
        with frozen(*pair.workers):
            job_id = pair.submit()
            pair.until("a message waits", lambda: queue.llen(QUEUE))
            queue.flushall()
        record_property("fault", "FLUSHALL while messages wait")
        ended = threading.Event()

        def flush() -> None:
            while not ended.wait(0.2):
                queue.flushall()

        flushing = threading.Thread(target=flush)
        flushing.start()
        try:
            pair.ended(job_id)
        finally:
            ended.set()
            flushing.join()
        record_property("fault", "FLUSHALL five times a second")
        survived(pair, undisturbed, job_id)


def test_a_broker_that_pauses_its_clients(pair: World, undisturbed: Undisturbed, record_property: Told) -> None:
    with redis.Redis.from_url(pair.settings.broker.url) as queue:
        queue.execute_command("CLIENT", "PAUSE", 5_000)
    record_property("fault", "CLIENT PAUSE")
    survived(pair, undisturbed, pair.submit())
