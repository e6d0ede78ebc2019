"""Claims with real concurrency: who may take what, and that nobody waits for whoever stands still."""

import random
from collections import Counter
from datetime import timedelta
from functools import partial

import pytest
from sqlalchemy import text
from support.ledger_world import LedgerWorld, at_once, unit

from service import ledger
from service.ids import new_id
from service.ledger import Claim, Retries, claims
from service.ledger.state import JobStatus
from service.plan.stages import Stage


def test_claims_go_by_age_of_the_job_then_stage_then_shard(world: LedgerWorld) -> None:
    middle = (unit(Stage.TARGET_GRADIENTS), unit(Stage.EMBED, 1), unit(Stage.LANDMARK_GRADIENTS), unit(Stage.EMBED, 0))
    first, second = world.job(*middle), world.job()
    claims = [world.claim() for _ in range(5)]
    assert [(c.job_id, c.stage, c.shard) for c in claims] == [
        (first, Stage.LANDMARK_GRADIENTS, 0),
        (first, Stage.TARGET_GRADIENTS, 0),
        (first, Stage.EMBED, 0),
        (first, Stage.EMBED, 1),
        (second, Stage.PREPARE, 0),
    ]
    assert world.try_claim() is None


def test_a_claim_carries_what_the_worker_needs_and_starts_the_job(world: LedgerWorld) -> None:
    job_id = world.job(unit(Stage.EMBED, 3, key="embed/aa", total=7))
    claim = world.claim("host:1")
    assert (claim.job_id, claim.attempt, claim.stage, claim.shard) == (job_id, 1, Stage.EMBED, 3)
    assert (claim.artifact_key, claim.spec, claim.total) == ("embed/aa", {"shard": 3}, 7)
    job, row = world.row(job_id), world.unit(claim)
    assert job.status is JobStatus.RUNNING
    assert job.started_at is not None
    assert (row.worker_id, row.attempt, row.failures) == ("host:1", 1, 0)


def test_each_unit_is_claimed_by_one_of_many_claimers(world: LedgerWorld) -> None:
    jobs = [world.job(*(unit(Stage.EMBED, shard) for shard in range(8))) for _ in range(5)]

    def claim_all(worker: int) -> list[Claim]:
        claims = []
        while (claim := world.try_claim(f"w{worker}")) is not None:
            claims.append(claim)
        return claims

    outcomes = at_once([partial(claim_all, worker) for worker in range(8)])
    assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    claims = [claim for claimed in outcomes for claim in claimed]
    assert Counter((c.job_id, c.shard) for c in claims) == {(job, shard): 1 for job in jobs for shard in range(8)}
    assert {c.attempt for c in claims} == {1}


def test_an_artifact_is_made_by_one_unit_at_a_time_and_the_next_waits_for_its_end(world: LedgerWorld) -> None:
    jobs = [world.job(unit(Stage.EMBED, key="embed/shared")) for _ in range(3)]
    claim = world.claim()
    assert claim.job_id == jobs[0]
    assert world.try_claim() is None
    assert world.claimable_count() == 0
    world.finish(claim)
    claim = world.claim()
    assert claim.job_id == jobs[1]
    assert world.try_claim() is None
    world.fail(claim, retryable=False)
    assert world.claim().job_id == jobs[2]


def test_a_unit_that_waits_for_an_artifact_holds_up_no_other(world: LedgerWorld) -> None:
    world.job(unit(Stage.EMBED, key="embed/shared"))
    world.claim()
    waiting = world.job(unit(Stage.EMBED, key="embed/shared"), unit(Stage.TARGET_GRADIENTS))
    claim = world.claim()
    assert (claim.job_id, claim.stage) == (waiting, Stage.TARGET_GRADIENTS)


def test_no_two_of_many_claimers_make_the_same_artifact(world: LedgerWorld) -> None:
    for _ in range(6):
        world.empty()
        keys = [new_id("artifact") for _ in range(4)]
        for _ in range(4):
            shuffled = random.sample(keys, 4)
            world.job(*(unit(Stage.EMBED, shard, key=key) for shard, key in enumerate(shuffled)))
        outcomes = at_once([world.try_claim] * 8)
        assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        claims = [claim for claim in outcomes if claim is not None]
        assert sorted(claim.artifact_key for claim in claims) == sorted(keys)


def test_as_many_workers_as_a_job_has_units_all_get_one_though_each_locks_the_job(world: LedgerWorld) -> None:
    for _ in range(3):
        world.empty()
        world.job(*(unit(Stage.EMBED, shard) for shard in range(8)))
        outcomes = at_once([world.claim] * 8)
        assert sorted(claim.shard for claim in outcomes) == list(range(8))


def test_an_artifact_that_was_claimed_since_the_candidates_were_read_is_not_taken_twice(world: LedgerWorld) -> None:
    """The query for candidates does not see a claim that commits while it runs; the UPDATE does."""
    first, second = [world.job(unit(Stage.EMBED, key="embed/shared")) for _ in range(2)]
    world.claim()
    candidate = world.units(second)[0]
    with world.sessions.begin() as session:
        assert claims.take(session, candidate.id, "w", 60) is None
    assert (world.states(first), world.states(second)) == (["running"], ["pending"])


@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_nothing_of_an_ended_job_is_claimed(world: LedgerWorld, end: str) -> None:
    job_id = world.job(unit(Stage.EMBED, 0), unit(Stage.EMBED, 1))
    if end == "cancelled":
        world.cancel(job_id)
    else:
        world.fail(world.claim(), retryable=False)
    assert world.status(job_id) == end
    assert world.try_claim() is None


def test_nothing_of_a_job_that_is_being_cancelled_is_claimed(world: LedgerWorld) -> None:
    job_id = world.job(unit(Stage.EMBED, 0), unit(Stage.EMBED, 1))
    world.claim()
    world.cancel(job_id)
    assert world.status(job_id) == "cancelling"
    assert world.try_claim() is None


def test_a_claim_passes_over_a_job_that_is_held(world: LedgerWorld) -> None:
    held = world.job(unit(Stage.EMBED, 0), unit(Stage.EMBED, 1))
    other = world.job()
    claim = world.claim()
    assert claim.job_id == held
    with world.sessions() as stalled:
        ledger.lock_claim(stalled, claim)
        found = world.claim()
        assert found.job_id == other
        assert world.try_claim() is None
        stalled.rollback()
    assert world.claim().job_id == held


def test_a_claim_passes_over_an_artifact_that_a_claim_without_end_makes(world: LedgerWorld) -> None:
    first, second = world.job(unit(Stage.EMBED, key="embed/shared")), world.job(unit(Stage.EMBED, key="embed/shared"))
    other = world.job()
    with world.sessions() as stalled:
        claim = ledger.claim_unit(stalled, worker_id="stalled", lease_seconds=60)
        assert claim is not None
        assert claim.job_id == first
        assert world.claim().job_id == other != second
        stalled.rollback()


def test_the_delay_grows_with_each_failure() -> None:
    retries = Retries(max_attempts=4, seconds=10)
    assert [retries.delay(failures) for failures in (1, 2, 3)] == [10, 60, 360]
    assert Retries(max_attempts=4, seconds=0).delay(3) == 0


def test_a_unit_that_failed_is_not_claimed_before_its_time(world: LedgerWorld) -> None:
    job_id = world.job()
    retries = Retries(max_attempts=3, seconds=600)
    for failures in (1, 2):
        claim = world.claim()
        assert world.unit(claim).not_before is None
        with world.engine.connect() as connection:
            before = connection.scalar(text("SELECT clock_timestamp()"))
            assert world.fail(claim, retryable=True, retries=retries) is True
            after = connection.scalar(text("SELECT clock_timestamp()"))
        until = world.unit(claim).not_before
        assert until is not None
        delay = timedelta(seconds=retries.delay(failures))
        assert before + delay <= until <= after + delay
        assert world.claimable_count() == 0
        assert world.try_claim() is None
        assert world.status(job_id) == "running"
        world.end_delay(claim.unit_id)
        assert world.claimable_count() == 1
    world.release(world.claim())
    assert world.claimable_count() == 1, "a unit that was given back waits for nothing"


def test_a_unit_that_waits_for_its_time_holds_up_no_other(world: LedgerWorld) -> None:
    job_id = world.job(unit(Stage.EMBED, 0), unit(Stage.EMBED, 1))
    world.fail(world.claim(), retryable=True, retries=Retries(max_attempts=3, seconds=600))
    assert world.claimable_count() == 1
    assert world.claim().shard == 1
    world.cancel(job_id)
    assert world.states(job_id) == ["cancelled", "running"]


def test_an_expired_lease_is_tried_again_at_once(world: LedgerWorld) -> None:
    world.job()
    world.lose_lease(world.claim())
    assert world.expire(Retries(max_attempts=3, seconds=600)) == 1
    assert world.claim().attempt == 2


def test_the_error_of_a_job_tells_why_each_attempt_of_its_unit_failed(world: LedgerWorld) -> None:
    job_id = world.job(unit(Stage.EMBED, 0), unit(Stage.EMBED, 1))
    other, claim = world.claim(), world.claim()
    world.fail(other, retryable=True, code="of_another_unit")
    world.finish(world.claim())
    world.fail(claim, retryable=True, code="out_of_memory")
    world.release(world.claim())
    world.lose_lease(world.claim("host:1"))
    world.expire()
    world.fail(world.claim(), retryable=True, code="storage_full")
    error = world.row(job_id).error
    assert error is not None
    assert (error["code"], error["attempts"]) == ("storage_full", 4)
    assert error["history"] == [
        {"attempt": 1, "code": "out_of_memory", "detail": "It is out_of_memory."},
        {
            "attempt": 3,
            "code": "lease_expired",
            "detail": "Worker host:1 stopped answering (killed, cut off, or out of memory).",
        },
        {"attempt": 4, "code": "storage_full", "detail": "It is storage_full."},
    ]
