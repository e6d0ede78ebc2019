"""Leases and the fence: a worker that lost its lease writes nothing, and one that stands still holds up no sweep."""

from collections.abc import Callable

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from support.ledger_world import LATE, LedgerWorld, at_once, unit, wait_until

from service import ledger
from service.db.engine import make_engine, make_sessions
from service.ledger import Claim, LeaseLost
from service.ledger.state import JobStatus
from service.plan.stages import Stage
from service.settings import DatabaseSettings


def test_a_beat_renews_the_lease_and_never_lowers_the_progress(world: LedgerWorld) -> None:
    world.job(unit(Stage.EMBED, total=100))
    claim = world.claim(lease_seconds=5)
    before = world.unit(claim).lease_expires_at
    seen = []
    for done in (10, 40, 30, 250):
        assert world.beat(claim, done).cancelling is False
        seen.append(world.unit(claim).progress_done)
    assert seen == [10, 40, 40, 100]
    after = world.unit(claim).lease_expires_at
    assert after is not None
    assert before is not None
    assert (after - before).total_seconds() > 50


def test_a_beat_tells_of_a_cancel(world: LedgerWorld) -> None:
    job_id = world.job()
    claim = world.claim()
    world.cancel(job_id)
    assert world.beat(claim).cancelling is True


LOST: dict[str, Callable[[LedgerWorld, Claim], object]] = {
    "taken back": lambda world, claim: (world.lose_lease(claim), world.expire()),
    "claimed by another": lambda world, claim: (world.lose_lease(claim), world.expire(), world.claim("other")),
    "claimed by itself": lambda world, claim: (world.release(claim), world.claim()),
    "finished": lambda world, claim: world.finish(claim),
    "cancelled": lambda world, claim: (world.cancel(claim.job_id), world.release(claim)),
    "job failed": lambda world, claim: world.fail(claim, retryable=False),
}


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("lost", LOST)
def test_a_lost_lease_writes_nothing(world: LedgerWorld, lost: str, late: str) -> None:
    world.job(unit(Stage.EMBED))
    claim = world.claim()
    LOST[lost](world, claim)
    before = world.image()
    with pytest.raises(LeaseLost):
        LATE[late](world, claim)
    assert world.image() == before


@pytest.mark.parametrize("late", LATE)
def test_the_failure_of_one_unit_takes_the_leases_of_the_others(world: LedgerWorld, late: str) -> None:
    world.job(unit(Stage.EMBED, 0), unit(Stage.EMBED, 1))
    culprit, sibling = world.claim(), world.claim()
    world.fail(culprit, retryable=False)
    before = world.image()
    with pytest.raises(LeaseLost):
        LATE[late](world, sibling)
    assert world.image() == before


def test_an_expired_lease_goes_back_and_counts_as_a_failure(world: LedgerWorld) -> None:
    job_id = world.job()
    claim = world.claim("host:1")
    assert world.expire() == 0, "the lease still holds"
    world.lose_lease(claim)
    assert world.expire() == 1
    assert world.expire() == 0
    row = world.unit(claim)
    assert (row.state, row.failures, row.lease_expires_at, row.finished_at) == ("pending", 1, None, None)
    kind, data = world.events(job_id)[-1]
    assert kind == "unit.attempt_failed"
    assert (data["attempt"], data["retried"], data["error"]["code"]) == (1, True, "lease_expired")
    assert "host:1" in data["error"]["detail"]
    assert world.claim("host:2").attempt == 2


def test_the_last_attempt_fails_the_job_and_the_events_tell_why_each_attempt_failed(world: LedgerWorld) -> None:
    job_id = world.job(unit(Stage.EMBED, 0), unit(Stage.EMBED, 1))
    world.fail(world.claim("a"), retryable=True, code="out_of_memory")
    for worker in ("b", "c"):
        claim = world.claim(worker)
        assert claim.shard == 0
        world.lose_lease(claim)
        assert world.expire() == 1
    job = world.row(job_id)
    assert job.status is JobStatus.FAILED
    assert job.finished_at is not None
    assert job.error is not None
    assert (job.error["code"], job.error["stage"], job.error["shard"]) == ("lease_expired", "embed", 0)
    assert world.states(job_id) == ["failed", "cancelled"]
    reasons = [
        (data["attempt"], data["error"]["code"], data["retried"])
        for kind, data in world.events(job_id)
        if kind == "unit.attempt_failed"
    ]
    assert reasons == [(1, "out_of_memory", True), (2, "lease_expired", True), (3, "lease_expired", False)]


def test_a_beat_that_comes_before_the_sweep_saves_the_unit(world: LedgerWorld) -> None:
    world.job()
    claim = world.claim()
    world.lose_lease(claim)
    world.beat(claim)
    assert world.expire() == 0
    assert world.unit(claim).state == "running"


def test_many_sweeps_at_once_count_one_failure(world: LedgerWorld) -> None:
    world.job(*(unit(Stage.EMBED, shard) for shard in range(4)))
    claims = [world.claim() for _ in range(4)]
    for claim in claims:
        world.lose_lease(claim)
    outcomes = at_once([world.expire] * 6)
    assert sum(outcomes) == 4
    assert [world.unit(claim).failures for claim in claims] == [1] * 4


def test_a_lease_of_a_job_that_is_being_cancelled_ends_it_when_it_expires(world: LedgerWorld) -> None:
    job_id = world.job()
    claim = world.claim()
    world.cancel(job_id)
    world.lose_lease(claim)
    assert world.expire() == 1
    assert world.status(job_id) == "cancelled"
    assert world.states(job_id) == ["cancelled"]


def test_a_job_whose_row_is_held_holds_up_no_sweep(world: LedgerWorld) -> None:
    for _ in range(3):
        world.job()
    claims = [world.claim() for _ in range(3)]
    for claim in claims:
        world.lose_lease(claim)
    with world.sessions() as stalled:
        ledger.lock_claim(stalled, claims[0])
        assert world.expire() == 2
        assert [world.unit(claim).state for claim in claims] == ["running", "pending", "pending"]
        stalled.rollback()
    assert world.expire() == 1
    assert world.unit(claims[0]).state == "pending"


def test_a_beat_that_stands_still_holds_up_no_sweep(world: LedgerWorld) -> None:
    world.job(unit(Stage.EMBED, 0), unit(Stage.EMBED, 1))
    claims = [world.claim(), world.claim()]
    for claim in claims:
        world.lose_lease(claim)
    with world.sessions() as stalled:
        ledger.beat(stalled, claims[0], lease_seconds=60, done=1)
        assert world.expire() == 1
        stalled.rollback()
    assert world.expire() == 1
    assert [world.unit(claim).failures for claim in claims] == [1, 1]


def test_a_transaction_that_stands_still_is_ended_and_the_row_is_free(world: LedgerWorld) -> None:
    """As of a worker that was stopped in the midst of a write."""
    world.job()
    claim = world.claim()
    engine = make_engine(DatabaseSettings(url=world.url, pool_size=1), idle_in_transaction_seconds=1)
    lock = text("SELECT id FROM selection_jobs WHERE id = :id FOR UPDATE SKIP LOCKED")

    def is_free() -> bool:
        with world.engine.begin() as connection:
            return connection.scalar(lock, {"id": claim.job_id}) is not None

    with make_sessions(engine)() as stalled:
        job = ledger.lock_claim(stalled, claim)
        assert not is_free()
        wait_until(is_free, 60, "the held row is free")
        with pytest.raises(DBAPIError) as caught:
            ledger.finish_unit(stalled, job, claim, {})
        assert caught.value.connection_invalidated
    engine.dispose()
    assert world.unit(claim).state == "running"
