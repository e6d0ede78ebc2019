"""What Prometheus reads of the ledger, of database and broker, and of the dispatcher."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from prometheus_client import CollectorRegistry
from sqlalchemy import text
from support.ledger_world import LedgerWorld, unit, wait_until
from support.metrics_world import SOON, read, settings_of, value
from support.world import World

from service import ledger
from service.background.dispatcher import QUEUE, Dispatcher
from service.health.exposition import LedgerCollector
from service.ledger.workers import record_worker
from service.observability.api_metrics import DispatchMetrics
from service.plan.stages import Stage
from service.settings import ApiSettings, BrokerSettings, DatabaseSettings

NOWHERE = "127.0.0.1:1"


@pytest.fixture
def of_world(world: LedgerWorld, broker_url: str, tmp_path: Path) -> ApiSettings:
    return settings_of(world, broker_url, tmp_path)


@contextmanager
def collecting(settings: ApiSettings, cache_seconds: float = 0) -> Iterator[CollectorRegistry]:
    registry = CollectorRegistry()
    collector = LedgerCollector(settings, cache_seconds=cache_seconds)
    registry.register(collector)
    yield registry
    collector.close()


def test_jobs_units_and_workers_as_the_ledger_has_them(world: LedgerWorld, of_world: ApiSettings) -> None:
    done, running, cancelling = world.job(), world.job(unit(Stage.EMBED, 0), unit(Stage.EMBED, 1)), world.job()
    world.finish(world.claim())
    claim = world.claim()
    assert claim.job_id == running
    world.cancel(done)
    for worker_id, stopped in (("alive", False), ("ended", True), ("silent", False)):
        with world.sessions.begin() as session:
            record_worker(session, worker_id, "1", stopped=stopped)
    with world.engine.begin() as connection:
        connection.execute(text("UPDATE workers SET seen_at = now() - interval '1 hour' WHERE worker_id = 'silent'"))
    with collecting(of_world) as registry:
        found = read(registry)
        assert value(found, "database_up") == value(found, "broker_up") == 1
        assert [value(found, "jobs", status=s) for s in ("queued", "running", "cancelling")] == [1, 1, 0]
        assert value(found, "units", stage="embed", state="running") == 1
        assert value(found, "units", stage="embed", state="pending") == 1
        assert value(found, "units", stage="prepare", state="pending") == 1
        assert value(found, "units", stage="prepare", state="succeeded") is None, "of a job that has ended"
        assert value(found, "workers_alive") == 1
        assert value(found, "leases_expired") == 0
        assert value(found, "artifacts_free_bytes") > 0

        world.lose_lease(claim)
        assert value(read(registry), "leases_expired") == 1
        world.expire()
        assert value(read(registry), "leases_expired") == 0
        world.cancel(cancelling)
        world.claim()
        world.cancel(running)
        assert value(read(registry), "jobs", status="cancelling") == 1


def test_what_is_claimable_is_what_a_claim_would_take(world: LedgerWorld, of_world: ApiSettings) -> None:
    def agrees(registry: CollectorRegistry, count: int) -> float | None:
        found = read(registry)
        with world.sessions() as session:
            assert value(found, "units_claimable") == ledger.claimable_count(session) == count
        return value(found, "oldest_claimable_unit_seconds")

    with collecting(of_world) as registry:
        assert agrees(registry, 0) == 0
        first = world.job(unit(Stage.EMBED, 0, key="shared"), unit(Stage.EMBED, 1))
        world.job(unit(Stage.EMBED, key="shared"))
        with world.engine.begin() as connection:
            connection.execute(text("UPDATE job_units SET created_at = now() - interval '1 hour'"))
        assert 3600 <= agrees(registry, 3) < 3700
        claim = world.claim()
        assert claim.artifact_key == "shared"
        agrees(registry, 1)  # the other of that artifact waits for it
        world.fail(claim, retryable=True, retries=ledger.Retries(max_attempts=3, seconds=600))
        agrees(registry, 2)  # this one is not due
        world.fail(world.claim(), retryable=True)
        world.release(world.claim())
        world.claim()
        world.cancel(first)
        agrees(registry, 1 if world.status(first) == "cancelling" else 0)


def test_scrapes_that_follow_closely_ask_once(world: LedgerWorld, of_world: ApiSettings) -> None:
    with collecting(of_world, cache_seconds=600) as registry:
        assert value(read(registry), "jobs", status="queued") == 0
        world.job()
        assert value(read(registry), "jobs", status="queued") == 0


def test_a_scrape_answers_though_database_and_broker_do_not(api: World, of_world: ApiSettings) -> None:
    away = of_world.model_copy(
        update={
            "database": DatabaseSettings(url=f"postgresql://nobody@{NOWHERE}/none"),
            "broker": BrokerSettings(url=f"redis://{NOWHERE}/0"),
        }
    )
    with collecting(away) as registry:
        found = read(registry)
    assert value(found, "database_up") == value(found, "broker_up") == 0
    assert not any(name in ("winnow_jobs", "winnow_workers_alive") for name, _ in found)


def test_a_database_that_hangs_holds_up_no_scrape_and_is_told(world: LedgerWorld, of_world: ApiSettings) -> None:
    with collecting(of_world) as registry:
        with world.engine.begin() as connection:
            connection.execute(text("LOCK TABLE selection_jobs"))
            assert value(read(registry), "database_up") == 0
        wait_until(lambda: value(read(registry), "database_up") == 1, SOON, "the database answers again")


def test_messages_that_nobody_takes_are_counted(world: LedgerWorld, of_world: ApiSettings, broker_url: str) -> None:
    with redis.Redis.from_url(broker_url) as client, collecting(of_world) as registry:
        client.delete(QUEUE)
        client.rpush(QUEUE, "a", "b")
        assert value(read(registry), "broker_messages") == 2
        client.delete(QUEUE)


# The dispatcher


def test_the_dispatcher_counts_what_it_does(world: LedgerWorld, of_world: ApiSettings) -> None:
    registry = CollectorRegistry()
    dispatcher = Dispatcher(of_world, DispatchMetrics(registry))

    def count(name: str) -> float:
        return value(read(registry), name) or 0

    world.job()
    world.lose_lease(world.claim())
    cancelled = world.job(unit(Stage.EMBED))
    dispatcher.start()
    try:
        wait_until(lambda: count("leases_taken_back_total") == 1, SOON, "the lease is taken back")
        assert count("dispatch_leading") == 1
        wait_until(lambda: count("messages_sent_total") >= 1, SOON, "a worker is woken")
        while world.status(cancelled) == "queued":
            world.claim()
        world.cancel(cancelled)
        wait_until(lambda: count("cancels_forced_total") == 1, SOON, "the cancel is forced")
        assert count("dispatch_passes_failed_total") == 0
        with world.engine.begin() as connection:
            connection.execute(text("ALTER TABLE job_units RENAME TO job_units_away"))
            connection.execute(text(f"NOTIFY {Dispatcher.channel}"))
        wait_until(lambda: count("dispatch_passes_failed_total") >= 1, SOON, "a pass fails")
    finally:
        with world.engine.begin() as connection:
            connection.execute(text("ALTER TABLE IF EXISTS job_units_away RENAME TO job_units"))
        dispatcher.stop()
    assert count("dispatch_leading") == 0
