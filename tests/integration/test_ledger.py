"""The ledger on a real PostgreSQL, with real concurrency: who may claim what, fencing, leases, failures, cancels, events."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from itertools import pairwise

import pytest
from ledger_world import LedgerWorld, at_once, ledger_world, unit, wait_until
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from service.database import make_engine, make_sessions
from service.ids import new_id
from service.jobs import ledger
from service.jobs.ledger import Claim, LeaseLost, NotTerminal, Retries, claims
from service.jobs.state import JOB_TRANSITIONS, TERMINAL, JobStatus, Stage
from service.jobs.tables import SelectionJob
from service.settings import DatabaseSettings


@pytest.fixture(scope="module")
def _database(postgres_url: str) -> Iterator[LedgerWorld]:
    with ledger_world(postgres_url, lock_timeout="20s") as world:
        yield world


@pytest.fixture
def world(_database: LedgerWorld) -> LedgerWorld:
    _database.empty()
    return _database


# Claims


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


def test_a_missed_claim_keeps_no_job_locked(world: LedgerWorld) -> None:
    """Two claims that each kept the job they missed would wait for each other's."""
    first, second = world.job(unit(Stage.EMBED, key="embed/shared")), world.job()
    with world.sessions.begin() as holder, world.sessions.begin() as session:
        missed = claims._claimable_unit(session, None, 60, 60)
        assert missed is not None
        assert missed[1] == first
        ledger.claim_unit(holder, worker_id="a", lease_seconds=60)
        holder.commit()
        # The candidate of before: what a claim sees that looked just before the other one committed.
        candidates = iter([missed])
        real = claims._claimable_unit
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(claims, "_claimable_unit", lambda s, *more: next(candidates, None) or real(s, *more))
            claim = ledger.claim_unit(session, worker_id="b", lease_seconds=60)
        assert claim is not None
        assert claim.job_id == second
        with world.engine.begin() as connection:
            lock = text("SELECT id FROM selection_jobs WHERE id = :id FOR UPDATE NOWAIT")
            assert connection.scalar(lock, {"id": first}) == first


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


# Leases and the fence


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


LATE: dict[str, Callable[[LedgerWorld, Claim], object]] = {
    "beat": lambda world, claim: world.beat(claim, done=99),
    "finish": lambda world, claim: world.finish(claim, {"mine": True}),
    "fail": lambda world, claim: world.fail(claim, retryable=True),
    "fail for good": lambda world, claim: world.fail(claim, retryable=False),
    "release": lambda world, claim: world.release(claim),
}
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


# Ends of units


def test_a_finished_unit_has_its_result_its_full_progress_and_no_lease(world: LedgerWorld) -> None:
    world.job(unit(Stage.EMBED, total=50))
    claim = world.claim()
    world.beat(claim, 20)
    world.finish(claim, {"rows": 50})
    row = world.unit(claim)
    assert (row.state, row.result, row.progress_done, row.lease_expires_at) == ("succeeded", {"rows": 50}, 50, None)
    assert row.finished_at is not None


def test_a_group_is_complete_with_its_last_unit_and_only_then(world: LedgerWorld) -> None:
    world.job(unit(Stage.EMBED, 0), unit(Stage.EMBED, 1), unit(Stage.LANDMARK_GRADIENTS), unit(Stage.TARGET_GRADIENTS))
    claims = [world.claim() for _ in range(4)]
    assert [world.finish(claim) for claim in reversed(claims)] == [False, False, False, True]


def test_of_units_that_finish_at_once_exactly_one_completes_the_group(world: LedgerWorld) -> None:
    for _ in range(8):
        world.empty()
        job_id = world.job(*(unit(Stage.EMBED, shard) for shard in range(5)), unit(Stage.TARGET_GRADIENTS))
        claims = [world.claim() for _ in range(6)]
        outcomes = at_once([partial(world.finish, claim) for claim in claims])
        assert sorted(map(str, outcomes)) == ["False"] * 5 + ["True"]
        assert world.states(job_id) == ["succeeded"] * 6


def test_only_one_of_two_that_finish_the_same_unit_is_heard(world: LedgerWorld) -> None:
    for _ in range(5):
        world.empty()
        job_id = world.job()
        claim = world.claim()
        outcomes = at_once([partial(world.finish, claim)] * 2)
        assert sorted(type(outcome) for outcome in outcomes if outcome is not True) == [LeaseLost]
        assert world.event_types(job_id).count("unit.succeeded") == 1


def test_a_job_goes_through_its_stages_to_its_end(world: LedgerWorld) -> None:
    job_id = world.job()
    for following in ([Stage.EMBED, Stage.LANDMARK_GRADIENTS], [Stage.PROPAGATE], [Stage.SELECT], [Stage.PUBLISH], []):
        claims: list[Claim] = []
        while (claim := world.try_claim()) is not None:
            claims.append(claim)
        complete = [world.finish(claim) for claim in claims]
        assert complete == [False] * (len(claims) - 1) + [True]
        if following:
            world.start(job_id, *(unit(stage) for stage in following))
    job = world.row(job_id)
    assert job.status is JobStatus.SUCCEEDED
    assert job.finished_at is not None
    assert set(world.states(job_id)) == {"succeeded"}
    assert world.event_types(job_id)[-2:] == ["unit.succeeded", "job.succeeded"]
    started = [data for kind, data in world.events(job_id) if kind == "stages.started"]
    assert started[0] == {"stages": ["embed", "landmark_gradients"], "units": 2}


def test_a_failure_that_can_pass_is_tried_again_with_its_error_kept(world: LedgerWorld) -> None:
    job_id = world.job()
    claim = world.claim()
    assert world.fail(claim, retryable=True) is True
    row = world.unit(claim)
    assert (row.state, row.failures) == ("pending", 1)
    assert row.error == {"code": "broken", "detail": "It is broken."}
    assert world.status(job_id) == "running"
    again = world.claim()
    assert (again.unit_id, again.attempt) == (claim.unit_id, 2)
    assert world.finish(again) is True


def test_a_failure_for_good_fails_the_job_and_cancels_its_other_units(world: LedgerWorld) -> None:
    job_id = world.job(unit(Stage.EMBED, 0), unit(Stage.EMBED, 1), unit(Stage.EMBED, 2), unit(Stage.EMBED_TARGET))
    done, culprit, _running = world.claim(), world.claim(), world.claim()
    world.finish(done)
    assert world.fail(culprit, retryable=False) is False
    assert world.states(job_id) == ["succeeded", "failed", "cancelled", "cancelled"]
    job = world.row(job_id)
    assert job.status is JobStatus.FAILED
    assert job.error == {
        "code": "broken",
        "detail": "It is broken.",
        "stage": "embed",
        "shard": 1,
        "attempts": 1,
        "history": [{"attempt": 1, "code": "broken", "detail": "It is broken."}],
    }
    assert world.events(job_id)[-2:] == [
        ("units.cancelled", {"stages": ["embed", "embed_target"], "units": 2}),
        ("job.failed", {"error": job.error}),
    ]


def test_a_release_costs_no_try(world: LedgerWorld) -> None:
    job_id = world.job()
    for attempt in range(1, 6):
        claim = world.claim()
        assert claim.attempt == attempt
        world.release(claim)
    row = world.unit(claim)
    assert (row.state, row.failures) == ("pending", 0)
    claim = world.claim()
    assert world.fail(claim, retryable=True, retries=Retries(max_attempts=2, seconds=0)) is True
    assert world.status(job_id) == "running"
    assert world.event_types(job_id).count("unit.released") == 5


def test_progress_starts_anew_with_each_attempt(world: LedgerWorld) -> None:
    world.job(unit(Stage.EMBED, total=10))
    claim = world.claim()
    world.beat(claim, 8)
    world.release(claim)
    assert world.unit(world.claim()).progress_done == 0


# Waiting before the next attempt


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


# Who stands still


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


# Cancels


def test_a_queued_job_is_cancelled_at_once(world: LedgerWorld) -> None:
    job_id = world.job(unit(Stage.EMBED, 0), unit(Stage.EMBED, 1))
    world.cancel(job_id)
    job = world.row(job_id)
    assert job.status is JobStatus.CANCELLED
    assert job.cancel_requested_at is not None
    assert job.finished_at is not None
    assert world.states(job_id) == ["cancelled"] * 2
    assert world.events(job_id)[1:] == [
        ("units.cancelled", {"stages": ["embed"], "units": 2}),
        ("job.cancelled", {}),
    ]


def test_a_running_job_with_no_unit_at_work_is_cancelled_at_once(world: LedgerWorld) -> None:
    job_id = world.job()
    world.release(world.claim())
    world.cancel(job_id)
    assert world.status(job_id) == "cancelled"


ENDINGS: dict[str, Callable[[LedgerWorld, Claim], object]] = {
    "release": lambda world, claim: world.release(claim),
    "finish": lambda world, claim: world.finish(claim),
    "fail": lambda world, claim: world.fail(claim, retryable=False),
    "fail retryably": lambda world, claim: world.fail(claim, retryable=True),
    "expire": lambda world, claim: (world.lose_lease(claim), world.expire()),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_job_at_work_is_cancelled_when_its_last_unit_has_stopped(world: LedgerWorld, ending: str) -> None:
    job_id = world.job(*(unit(Stage.EMBED, shard) for shard in range(3)))
    first, second = world.claim(), world.claim()
    world.cancel(job_id)
    assert world.status(job_id) == "cancelling"
    assert world.states(job_id) == ["running", "running", "cancelled"]
    ENDINGS[ending](world, first)
    assert world.status(job_id) == "cancelling"
    ENDINGS[ending](world, second)
    job = world.row(job_id)
    assert job.status is JobStatus.CANCELLED
    assert job.error is None
    assert "running" not in world.states(job_id)
    assert "pending" not in world.states(job_id)
    types = world.event_types(job_id)
    assert types.count("job.cancelled") == types.count("job.cancelling") == 1


def test_a_unit_that_finishes_while_cancelling_starts_no_next_stage(world: LedgerWorld) -> None:
    job_id = world.job()
    claim = world.claim()
    world.cancel(job_id)
    assert world.finish(claim) is False
    assert world.status(job_id) == "cancelled"


@pytest.mark.parametrize("status", ["cancelling", "cancelled", "failed", "succeeded"])
def test_a_cancel_changes_nothing_where_it_can_no_longer(world: LedgerWorld, status: str) -> None:
    job_id = world.job(unit(Stage.PUBLISH))
    claim = world.claim()
    if status in ("cancelling", "cancelled"):
        world.cancel(job_id)
    if status == "cancelled":
        world.release(claim)
    if status == "failed":
        world.fail(claim, retryable=False)
    if status == "succeeded":
        world.finish(claim)
    assert world.status(job_id) == status
    before = world.image()
    world.cancel(job_id)
    assert world.image() == before


def test_a_cancel_that_is_overdue_is_carried_through_without_its_workers(world: LedgerWorld) -> None:
    job_id = world.job(*(unit(Stage.EMBED, shard) for shard in range(3)))
    running, done = [world.claim(), world.claim()], world.claim()
    world.finish(done)
    world.cancel(job_id)
    assert world.expire_cancels() == 0, "its workers have their time yet"
    world.age_cancel(job_id)
    assert world.expire_cancels() == 1
    assert world.expire_cancels() == 0
    job = world.row(job_id)
    assert job.status is JobStatus.CANCELLED
    assert job.finished_at is not None
    assert world.states(job_id) == ["cancelled", "cancelled", "succeeded"]
    assert world.events(job_id)[-2:] == [
        ("units.cancelled", {"stages": ["embed"], "units": 2, "reason": "the workers did not stop in time"}),
        ("job.cancelled", {}),
    ]
    before = world.image()
    for claim in running:
        for late in LATE.values():
            with pytest.raises(LeaseLost):
                late(world, claim)
    assert world.image() == before


def test_only_cancels_that_are_overdue_and_free_are_carried_through(world: LedgerWorld) -> None:
    for _ in range(4):
        world.job()
    overdue, held, in_time, at_work = claims = [world.claim() for _ in range(4)]
    for claim in (overdue, held, in_time):
        world.cancel(claim.job_id)
    for claim in (overdue, held):
        world.age_cancel(claim.job_id)
    with world.sessions() as stalled:
        ledger.lock_claim(stalled, held)
        assert world.expire_cancels() == 1
        stalled.rollback()
    assert [world.status(claim.job_id) for claim in claims] == ["cancelled", "cancelling", "cancelling", "running"]
    assert world.unit(at_work).state == "running"


def _supervise(world: LedgerWorld, claim: Claim) -> None:
    """A worker whose unit is done: it publishes, or sees the cancel and gives the unit back."""
    with world.sessions.begin() as session:
        job = ledger.lock_claim(session, claim)
        if job.status is JobStatus.CANCELLING:
            ledger.release_unit(session, claim, reason="the job is being cancelled")
            return
        ledger.finish_unit(session, job, claim, {})
        ledger.succeed_job(session, job)


def test_a_cancel_that_races_the_end_of_the_job_leaves_one_terminal_state(world: LedgerWorld) -> None:
    ends = Counter()
    for i in range(36):
        job_id = world.job(unit(Stage.PUBLISH))
        claim = world.claim()
        rivals = [partial(_supervise, world, claim), partial(world.cancel, job_id), partial(world.cancel, job_id)]
        if i % 3 == 0:
            rivals = [partial(world.fail, claim, retryable=False), *rivals[1:]]
        outcomes = at_once(random.sample(rivals, len(rivals)))
        assert not [o for o in outcomes if isinstance(o, Exception)]
        job = world.row(job_id)
        assert job.status in TERMINAL
        assert set(world.states(job_id)) <= {"succeeded", "failed", "cancelled"}
        ended = [kind for kind in world.event_types(job_id) if kind in {f"job.{status}" for status in TERMINAL}]
        assert ended == [f"job.{job.status}"]
        ends[job.status] += 1
    assert sum(ends.values()) == 36


def test_cancels_claims_and_ends_at_once_leave_a_ledger_that_makes_sense(world: LedgerWorld) -> None:
    for _ in range(10):
        world.empty()
        jobs = [world.job(*(unit(Stage.EMBED, shard) for shard in range(3))) for _ in range(2)]
        claims = [world.claim(), world.claim()]
        world.lose_lease(claims[1])
        rivals = [
            partial(world.finish, claims[0]),
            partial(world.fail, claims[1], retryable=False),
            partial(world.cancel, jobs[0]),
            world.expire,
            *[world.try_claim] * 3,
        ]
        outcomes = at_once(random.sample(rivals, len(rivals)))
        assert {type(o) for o in outcomes if isinstance(o, Exception)} <= {LeaseLost}
        for job_id in jobs:
            status, states = world.row(job_id).status, world.states(job_id)
            if status in TERMINAL:
                assert not {"running", "pending"} & set(states)
            if status is JobStatus.CANCELLING:
                assert "running" in states
                assert "pending" not in states


# Deletion


@pytest.mark.parametrize("status", ["queued", "running", "cancelling"])
def test_a_job_that_has_not_ended_is_not_deleted(world: LedgerWorld, status: str) -> None:
    job_id = world.job()
    if status != "queued":
        world.claim()
    if status == "cancelling":
        world.cancel(job_id)
    assert world.status(job_id) == status
    before = world.image()
    with pytest.raises(NotTerminal):
        world.delete(job_id)
    assert world.image() == before


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
def test_of_a_deleted_job_only_its_row_is_left(world: LedgerWorld, status: str) -> None:
    job_id, other = world.job(unit(Stage.PUBLISH)), world.job(unit(Stage.PUBLISH))
    ends = {"succeeded": world.finish, "failed": partial(world.fail, retryable=False), "cancelled": world.release}
    claim = world.claim()
    if status == "cancelled":
        world.cancel(job_id)
    ends[status](claim)
    with world.sessions.begin() as session:
        session.get_one(SelectionJob, job_id).job_metadata = {"of": "the tenant"}
    ended = world.row(job_id)
    world.delete(job_id)
    job = world.row(job_id)
    assert job.deleted_at is not None
    assert (job.status, job.finished_at, job.error) == (ended.status, ended.finished_at, ended.error)
    assert (job.job_metadata, world.units(job_id), world.events(job_id)) == ({}, [], [])
    assert len(world.units(other)) == len(world.events(other)) == 1
    before = world.image()
    world.delete(job_id)
    world.cancel(job_id)
    for late in LATE.values():
        with pytest.raises(LeaseLost):
            late(world, claim)
    assert world.image() == before


def test_a_deletion_goes_by_the_job_as_it_is_and_not_as_it_was_read(world: LedgerWorld) -> None:
    """Two requests have read a job that runs; it ends, one deletes it, and then the other does."""
    job_id = world.job(unit(Stage.PUBLISH))
    claim = world.claim()
    with world.sessions() as first, world.sessions() as second:
        requests = [(session, session.get_one(SelectionJob, job_id)) for session in (first, second)]
        world.finish(claim)
        images = []
        for session, job in requests:
            ledger.delete_job(session, job)
            session.commit()
            images.append(world.image())
    assert world.row(job_id).deleted_at is not None
    assert images[0] == images[1]


def test_a_deletion_that_races_the_end_comes_before_or_after_it(world: LedgerWorld) -> None:
    for _ in range(8):
        world.empty()
        job_id = world.job(unit(Stage.PUBLISH))
        claim = world.claim()
        refused, *outcomes = at_once([partial(world.delete, job_id), partial(world.finish, claim)])
        assert outcomes == [True]
        if refused is None:
            assert world.event_types(job_id) == []
        else:
            assert isinstance(refused, NotTerminal)
            assert world.event_types(job_id)[-1] == "job.succeeded"


# Events


def test_a_running_unit_tells_of_itself_and_one_that_lost_its_lease_is_not_heard(world: LedgerWorld) -> None:
    job_id = world.job(unit(Stage.WARMUP))
    claim = world.claim()
    world.tell(claim, "warmup.step", {"step": 3, "loss": 1.5})
    assert world.events(job_id)[-1] == ("warmup.step", {"stage": "warmup", "shard": 0, "step": 3, "loss": 1.5})
    world.release(claim)
    before = world.image()
    with pytest.raises(LeaseLost):
        world.tell(claim, "warmup.step", {"step": 4, "loss": 1.4})
    assert world.image() == before


def test_every_change_has_its_event_in_order(world: LedgerWorld) -> None:
    job_id = world.job()
    world.release(world.claim("a"))
    world.fail(world.claim("b"), retryable=True)
    claim = world.claim("c")
    world.cancel(job_id)
    world.release(claim)
    assert world.event_types(job_id) == [
        "job.queued",
        "job.running",
        "unit.claimed",
        "unit.released",
        "unit.claimed",
        "unit.attempt_failed",
        "unit.claimed",
        "job.cancelling",
        "unit.cancelled",
        "job.cancelled",
    ]
    claimed = [data for kind, data in world.events(job_id) if kind == "unit.claimed"]
    assert [(data["worker_id"], data["attempt"], data["stage"]) for data in claimed] == [
        ("a", 1, "prepare"),
        ("b", 2, "prepare"),
        ("c", 3, "prepare"),
    ]


def test_the_events_of_every_history_are_a_walk_along_the_transitions(world: LedgerWorld) -> None:
    """Random histories of one job: its `job.*` events are exactly the states it went through."""
    chance = random.Random(5)
    for _ in range(25):
        world.empty()
        job_id = world.job(unit(Stage.PUBLISH))
        steps = [*ENDINGS.values(), lambda world, claim: world.cancel(claim.job_id)]
        for _ in range(6):
            claim = world.try_claim()
            if claim is None:
                break
            chance.choice(steps)(world, claim)
            if chance.random() < 0.2:
                world.cancel(job_id)
        states = [JobStatus(kind.removeprefix("job.")) for kind in world.event_types(job_id) if kind.startswith("job.")]
        assert states[0] is JobStatus.QUEUED
        assert states[-1] is world.row(job_id).status
        assert set(pairwise(states)) <= JOB_TRANSITIONS


def test_an_event_that_cannot_be_written_undoes_the_change(world: LedgerWorld) -> None:
    job_id = world.job()
    before = world.image()
    with world.engine.begin() as connection:
        connection.execute(text("ALTER TABLE job_events ADD CONSTRAINT ck_no_more CHECK (type = 'job.queued')"))
    try:
        for change in (world.try_claim, partial(world.cancel, job_id)):
            with pytest.raises(Exception, match="ck_no_more"):
                change()
            assert world.image() == before
    finally:
        with world.engine.begin() as connection:
            connection.execute(text("ALTER TABLE job_events DROP CONSTRAINT ck_no_more"))
