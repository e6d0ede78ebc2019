"""Cancelling and deleting jobs, also while they end."""

import random
from collections import Counter
from functools import partial

import pytest
from support.ledger_world import ENDINGS, LATE, LedgerWorld, at_once, unit

from service import ledger
from service.ledger import Claim, LeaseLost, NotTerminal
from service.ledger.state import TERMINAL, JobStatus
from service.ledger.tables import SelectionJob
from service.plan.stages import Stage


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
    job_id = world.job(unit(Stage.VALIDATE))
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
        job_id = world.job(unit(Stage.VALIDATE))
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
    job_id, other = world.job(unit(Stage.VALIDATE)), world.job(unit(Stage.VALIDATE))
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
    job_id = world.job(unit(Stage.VALIDATE))
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
        job_id = world.job(unit(Stage.VALIDATE))
        claim = world.claim()
        refused, *outcomes = at_once([partial(world.delete, job_id), partial(world.finish, claim)])
        assert outcomes == [True]
        if refused is None:
            assert world.event_types(job_id) == []
        else:
            assert isinstance(refused, NotTerminal)
            assert world.event_types(job_id)[-1] == "job.succeeded"
